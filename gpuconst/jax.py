"""A JAX initializer, for flax and everything that takes those of `jax.nn.initializers`."""

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

try:  # what `jax.device_put` ends in, at a fifth of its cost
    from jaxlib.xla_client import batched_device_put
except ImportError:  # jaxlib promises to keep nothing
    batched_device_put = None

__all__ = ["constant"]


class constant:
    """Initializer that fills an array with a value; drop-in for `jax.nn.initializers.constant`.

    On the CPU the array lies in memory that gpuconst filled. While JAX traces, for an `out_sharding` or
    under a mesh, for a traced or array value, and on other devices, JAX fills: it does that at one copy of
    memory, and shard by shard. Unlike closures it can be pickled, and two of one value are equal.

    Parameters
    ----------
    value : scalar or array
        A Python or NumPy scalar is held to gpuconst's value policy: what does not fit the dtype is
        refused. An array, traced ones among them, is broadcast to the shape by JAX.
    dtype : optional
        For calls without one; by default JAX's default float.

    Raises
    ------
    TypeError
        If the value is no number and no array, when the initializer is made; or does not have the kind of
        the dtype, when it is called.
    OverflowError
        When called, if the value does not fit the dtype.

    Examples
    --------
    >>> import gpuconst
    >>> gpuconst.jax.constant(0.5)(None, (2, 3), "bfloat16")
    Array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]], dtype=bfloat16)
    """

    __slots__ = ("dtype", "value")

    value: Any
    dtype: Any

    def __init__(self, value: Any, dtype: Any = None) -> None:
        if isinstance(value, np.generic | np.ndarray) and is_number(value):
            value = value.item()  # the dtype of a value does not count
        if not (_is_scalar(value) or is_array(value)):
            raise TypeError(f"constant takes a bool, int, float, complex, NumPy scalar or array, not {brief(value)}")
        self.value = value
        self.dtype = None if dtype is None else jax.numpy.dtype(dtype)

    def __call__(self, key: Any, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Any:
        """Return an array filled with the value.

        Parameters
        ----------
        key : optional
            Not used; JAX's initializers take one.
        shape : sequence of int
            Elements along each dimension.
        dtype : optional
            By default that of the initializer. 64-bit types become 32-bit ones where JAX has them off.
        out_sharding : optional
            As JAX's own initializers take it.

        Returns
        -------
        jax.Array
        """
        asked = self.dtype if dtype is None else dtype
        row = None
        if _is_scalar(self.value):
            row = _row(asked)
            device = cpu_device() if row is not None and out_sharding is None and _is_plain(shape) else None
            if row is not None and device is not None:
                array = full(shape, self.value, dtype=row.name, device="cpu")
                debug("array filled by %s on cpu at %#x", array.backend, array.data_ptr())
                return as_jax(array.to_numpy(), device)
            if row is not None:
                encode(self.value, row)
            else:
                check_narrowed(self.value, asked)
        shard = {} if out_sharding is None else {"out_sharding": out_sharding}
        return jax.nn.initializers.constant(self.value)(key, shape, asked, **shard)

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
        return hash((repr(self.value) if _is_scalar(self.value) else None, self.dtype))

    def __reduce__(self) -> Any:
        return type(self), (self.value, self.dtype)

    def __repr__(self) -> str:
        return f"gpuconst.jax.constant({self.value!r}{'' if self.dtype is None else f', dtype={self.dtype.name!r}'})"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex)


def _is_plain(shape: Any) -> bool:
    """Whether all dimensions are numbers; JAX handles symbolic ones, such as those of an export, itself."""
    return isinstance(shape, Sequence) and all(isinstance(length, int | np.integer) for length in shape)


def _row(dtype: Any) -> DType | None:
    """Return the dtype of an array that JAX makes, if it is one of ours and JAX has nothing to say about it."""
    if dtype is None:
        return resolve_dtype(jax.dtypes.result_type(float))
    try:
        row = resolve_dtype(dtype)
    except TypeError:  # int4, random keys
        return None
    return row if jax.dtypes.canonicalize_dtype(row.numpy) == row.numpy else None  # else it warns


def check_narrowed(value: Any, dtype: Any) -> None:
    """Hold a value to the type that JAX has instead of a 64-bit one; JAX itself would wrap it."""
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
    """Return the device on which JAX would make an array now, if it is a CPU and takes the array whole."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = jax.default_backend() if default is None else getattr(default, "platform", default)
    if platform != "cpu" or _trace_state() != _not_tracing or not jax.sharding.get_abstract_mesh().empty:
        return None
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend="cpu")[0]
    device.memory_stats()  # JAX lets go of memory that it does not own when it is called next: before more is made
    return device


def as_jax(array: np.ndarray, device: jax.Device) -> jax.Array:
    """Return a JAX array of the same memory.

    Not through DLPack, which commits an array to its device; JAX's own are free.
    """
    made: jax.Array
    try:
        outline = jax.core.ShapedArray(array.shape, array.dtype)
        made = batched_device_put(outline, jax.sharding.SingleDeviceSharding(device), [array], [device], False)
    except TypeError:  # it is not there, or takes something else
        made = jax.device_put(array, may_alias=True)
    return made


def _trace_state() -> Any:
    return get_opaque_trace_state(convention="flax")  # type: ignore[no-untyped-call]


def _trace_state_of_a_new_thread() -> Any:
    """Return the state of tracing nothing; this module may be imported while JAX traces."""
    states: list[Any] = []
    thread = threading.Thread(target=lambda: states.append(_trace_state()))
    thread.start()
    thread.join()
    return states[0]


_not_tracing = _trace_state_of_a_new_thread()
