"""A JAX initializer, for flax and anything else that takes those of `jax.nn.initializers`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from .creation import full
from .dtypes import DType, resolve_dtype
from .errors import brief
from .log import debug
from .values import encode, is_array, is_number

try:
    import jax
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ImportError("JAX is not installed; pip install 'gpuconst[jax]'", name="jax") from error

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # JAX before 0.9
    from jax.core import get_opaque_trace_state

try:  # what `jax.device_put` ends up calling, at a fifth of its cost
    from jaxlib.xla_client import batched_device_put
except ImportError:  # jaxlib does not promise to keep it
    batched_device_put = None

__all__ = ["constant"]


class constant:
    """Initializer that fills an array with a value; a drop-in for `jax.nn.initializers.constant`.

    On the CPU, the array lives in memory that gpuconst filled. While JAX is tracing, for an `out_sharding`
    or under a mesh, for a traced or array value, and on other devices, JAX itself does the filling: shard
    by shard, and without a second copy in memory. Unlike JAX's closures, the initializer can be pickled,
    and two with the same value are equal.

    Parameters
    ----------
    value : scalar or array
        A Python or NumPy scalar follows gpuconst's value policy: one that does not fit the dtype is
        refused. An array, traced or not, is broadcast to the shape by JAX.
    dtype : optional
        The dtype for calls that give none; by default, JAX's default float.

    Raises
    ------
    TypeError
        When the initializer is made, if the value is neither a number nor an array; when it is called,
        if the value is of the wrong kind for the dtype.
    OverflowError
        When called, if the value does not fit the dtype.

    Examples
    --------
    >>> import gpuconst
    >>> gpuconst.jax.constant(0.5)(None, (2, 3), "bfloat16")
    Array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]], dtype=bfloat16)
    """

    def __init__(self, value: Any, dtype: Any = None) -> None:
        if isinstance(value, np.generic | np.ndarray) and is_number(value):
            value = value.item()  # the dtype of the value is ignored
        if not (_is_scalar(value) or is_array(value)):
            raise TypeError(f"constant takes a bool, int, float, complex, NumPy scalar or array, not {brief(value)}")
        self.value = value
        # Python's own types stay what they are: JAX takes them for its default types, as set when it is called.
        self.dtype = dtype if dtype is None or _is_pythons(dtype) else jax.numpy.dtype(dtype)

    def __call__(self, key: Any, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Any:
        """Return an array filled with the value.

        Parameters
        ----------
        key : optional
            Ignored; JAX's initializers take one.
        shape : sequence of int
            Elements along each dimension.
        dtype : optional
            By default, that of the initializer. 64-bit types become 32-bit ones if JAX has them off.
        out_sharding : optional
            As for JAX's own initializers.

        Returns
        -------
        jax.Array
        """
        asked = self.dtype if dtype is None else dtype
        if _is_scalar(self.value):
            row = _row(asked)
            if row is None:
                check_narrowed(self.value, asked)
            else:
                device = cpu_device() if out_sharding is None and _is_plain(shape) else None
                if device is not None:
                    array = full(shape, self.value, dtype=row.name, device="cpu")
                    debug("array filled by %s on cpu at %#x", array.backend, array.data_ptr())
                    return as_jax(array.to_numpy(), device)
                encode(self.value, row)
        value = self.value
        if isinstance(value, complex) and value.imag == 0 and not jax.numpy.issubdtype(asked, np.complexfloating):
            value = value.real  # JAX takes no complex number for a real dtype
        shard = {} if out_sharding is None else {"out_sharding": out_sharding}
        return jax.nn.initializers.constant(value)(key, shape, asked, **shard)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or self.dtype != other.dtype:
            return False
        if self.value is other.value:
            return True
        if _is_scalar(self.value) and _is_scalar(other.value):
            return repr(self.value) == repr(other.value)  # tells -0.0 from 0.0 and 1 from True; nan equals itself
        if any(isinstance(value, jax.core.Tracer) or _is_scalar(value) for value in (self.value, other.value)):
            return False
        mine, theirs = np.asarray(self.value), np.asarray(other.value)
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes()

    def __hash__(self) -> int:
        return hash(repr(self.value) if _is_scalar(self.value) else type(self))

    def __reduce__(self) -> Any:
        return type(self), (self.value, self.dtype)

    def __repr__(self) -> str:
        name = self.dtype.__name__ if _is_pythons(self.dtype) else repr(getattr(self.dtype, "name", None))
        return f"gpuconst.jax.constant({self.value!r}{'' if self.dtype is None else f', dtype={name}'})"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex)


def _is_pythons(dtype: Any) -> bool:
    return isinstance(dtype, type) and dtype in (bool, int, float, complex)


def _is_plain(shape: Any) -> bool:
    """Whether all dimensions are numbers; JAX handles symbolic ones, such as those of an export, itself."""
    return isinstance(shape, Sequence) and all(isinstance(length, int | np.integer) for length in shape)


def _row(dtype: Any) -> DType | None:
    """Return the row of the dtype that JAX would give an array, or None if we lack it or JAX would change it."""
    if dtype is None:
        return resolve_dtype(jax.dtypes.result_type(float))
    try:
        row = resolve_dtype(dtype)
    except TypeError:  # int4, random keys
        return None
    return row if jax.dtypes.canonicalize_dtype(row.numpy) == row.numpy else None  # else JAX warns


def check_narrowed(value: Any, dtype: Any) -> None:
    """Check that a value fits the type that JAX substitutes for a 64-bit one; JAX itself would wrap it."""
    try:
        asked = resolve_dtype(dtype)
    except TypeError:  # int4, random keys
        return
    encode(value, asked)
    row = resolve_dtype(jax.dtypes.canonicalize_dtype(asked.numpy))
    try:
        encode(value, row)
    except OverflowError:
        raise OverflowError(
            f"{brief(value)} does not fit {row.name}, which JAX takes for {asked.name} while 64-bit types are off; "
            "enable them: jax.config.update('jax_enable_x64', True)"
        ) from None


def cpu_device() -> jax.Device | None:
    """Return the device on which JAX would make an array now, if it is a CPU that gets the whole array; else None."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = jax.default_backend() if default is None else getattr(default, "platform", default)
    if platform != "cpu" or _trace_state() != _not_tracing or not jax.sharding.get_abstract_mesh().empty:
        return None
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend="cpu")[0]
    device.memory_stats()  # any call, so that JAX releases memory that it does not own before more is made
    return device


def as_jax(array: np.ndarray, device: jax.Device) -> jax.Array:
    """Return a JAX array that shares the memory.

    Not through DLPack, which would commit the array to its device; JAX's own arrays are uncommitted.
    """
    made: jax.Array
    try:
        outline = jax.core.ShapedArray(array.shape, array.dtype)
        made = batched_device_put(outline, jax.sharding.SingleDeviceSharding(device), [array], [device], False)
    except TypeError:  # it is missing, or takes other arguments
        made = jax.device_put(array, may_alias=True)
    return made


def _trace_state() -> Any:
    return get_opaque_trace_state(convention="flax")  # type: ignore[no-untyped-call]


def _trace_state_of_a_new_thread() -> Any:
    """Return the trace state when nothing is traced; this module may be imported while JAX is tracing."""
    states: list[Any] = []
    thread = threading.Thread(target=lambda: states.append(_trace_state()))
    thread.start()
    thread.join()
    return states[0]


_not_tracing = _trace_state_of_a_new_thread()
