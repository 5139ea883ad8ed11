"""Keras 3 initializers whose weights start in memory that gpuconst filled."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .array import Array
from .backends import select
from .creation import full
from .dtypes import resolve_dtype
from .errors import DeviceUnavailableError, brief
from .filling import fill
from .log import debug
from .torch_rules import has_memory
from .values import check_shape, encode, is_array, is_number

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    raise ImportError(
        "Keras is not installed, and gpuconst.Constant, Zeros and Ones are Keras initializers; "
        "pip install 'gpuconst[keras]' and a backend of it, or use gpuconst.full, which needs none",
        name="keras",
    ) from error

__all__ = ["Constant", "Ones", "Zeros"]

#: The debug message for each weight filled, with the backend, the device and the address.
FILLED = "weight filled by %s on %s at %#x"


@keras.saving.register_keras_serializable("gpuconst")
class Constant(keras.initializers.Constant):  # type: ignore[misc]
    """Initializer that fills a weight with one value, or with given values; a drop-in for Keras' own.

    On the TensorFlow, JAX and torch backends, the weight lives in memory that gpuconst filled, on the
    device where Keras would have put it, at half the peak memory of ``keras.initializers.Constant``.
    The backend's own ``full`` is used where Keras is tracing or there is no memory to fill (``jit``,
    graphs, meta tensors), or where gpuconst cannot reach the device, which a warning then reports once.
    It is also used on the NumPy and OpenVINO backends, where Keras copies what any initializer returns.

    Parameters
    ----------
    value : scalar or array-like
        A scalar follows gpuconst's value policy: one that does not fit the dtype is refused, unless
        `torch.compile` traces the call. An array or tensor is converted by the Keras backend and
        broadcast to the shape of the weight.

    Raises
    ------
    TypeError
        When the initializer is made, if the value is neither a number nor an array; when it is called,
        if the value is of the wrong kind for the dtype, or the shape is not known yet.
    OverflowError
        When called, if the value does not fit the dtype.
    ValueError
        When called, if an array value does not broadcast to the shape.

    Examples
    --------
    >>> import keras, gpuconst
    >>> layer = keras.layers.Dense(64, kernel_initializer=gpuconst.Constant(0.1))
    """

    def __init__(self, value: Any = 0.0) -> None:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
        if not (is_sequence or is_array(value) or is_number(value)):
            raise TypeError(f"Constant takes a bool, int, float, complex, NumPy scalar or array, not {brief(value)}")
        super().__init__(value)

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """Return a tensor of the Keras backend, filled with the value.

        Parameters
        ----------
        shape : sequence of int
            Elements along each dimension.
        dtype : str, optional
            By default, ``keras.config.floatx()``.
        """
        return _constant(self.value, shape, dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's argument as data that JSON can hold."""
        if isinstance(self.value, complex | np.complexfloating):
            # Keras cannot save a complex number; in this form, its own Constant refuses to load it
            # instead of taking it for a vector of two.
            return {"value": {"complex": [float(self.value.real), float(self.value.imag)]}}
        if isinstance(self.value, np.generic | Sequence):
            return {"value": _plain(self.value)}
        config: dict[str, Any] = super().get_config()
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Constant:
        """Return the initializer that `get_config` described; without a value, the default one."""
        if "value" not in config:
            return cls()
        value = config["value"]
        if isinstance(value, dict) and "complex" in value:
            return cls(complex(*value["complex"]))
        return cls(keras.saving.deserialize_keras_object(value))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        if self.value is other.value:
            return True
        if any(
            keras.ops.is_tensor(x) and not isinstance(x, np.ndarray | np.generic) for x in (self.value, other.value)
        ):
            return False  # they may be traced, and have no values to compare yet
        # The text tells 0.0 from -0.0 and 1 from True, and a nan equals itself.
        return repr(self.get_config()) == repr(other.get_config())

    def __hash__(self) -> int:
        return hash(type(self))  # hashing the value could mean reading an embedding matrix

    def __repr__(self) -> str:
        return f"gpuconst.Constant({self.value!r})"


def _plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's, and sequences as lists, inner ones too: JSON has only one kind."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(element) for element in value]
    return value


class _Fixed:
    """What `Zeros` and `Ones` share: they have no argument, so all of a kind are equal."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"gpuconst.{type(self).__name__}()"


@keras.saving.register_keras_serializable("gpuconst")
class Zeros(_Fixed, keras.initializers.Zeros):  # type: ignore[misc]
    """Initializer that fills a weight with zeros, in the same way as `Constant`."""

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """Return a tensor of the Keras backend; see `Constant`."""
        return _constant(0, shape, dtype)


@keras.saving.register_keras_serializable("gpuconst")
class Ones(_Fixed, keras.initializers.Ones):  # type: ignore[misc]
    """Initializer that fills a weight with ones, in the same way as `Constant`."""

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """Return a tensor of the Keras backend; see `Constant`."""
        return _constant(1, shape, dtype)


def _constant(value: Any, shape: Any, dtype: Any) -> Any:
    dtype = keras.backend.standardize_dtype(dtype)
    if isinstance(value, complex | np.complexfloating) and value.imag == 0 and not dtype.startswith("complex"):
        value = value.real  # frameworks take no complex number for a real dtype
    if _dynamo_compiles():
        return keras.initializers.Constant(value)(shape, dtype)
    is_scalar = is_number(value)
    if is_scalar:
        encode(value, resolve_dtype(dtype))  # in traced contexts too
    lengths = _read_shape(shape)
    if lengths is None:
        return keras.initializers.Constant(value)(shape, dtype)
    if not is_scalar:
        return _from_array(value, lengths, dtype)
    make = _MAKERS.get(keras.config.backend())
    if make is not None:
        try:
            tensor = make(lengths, value, dtype)
        except (MemoryError, DeviceUnavailableError) as error:
            _warn_once(error)
        else:
            if tensor is not None:
                return tensor
    # As a Python number: not every backend's full handles NumPy and ml_dtypes scalars correctly.
    # As a float for float dtypes: TensorFlow makes a float8 of nothing else.
    number = value.item() if isinstance(value, np.generic | np.ndarray) else value
    return keras.ops.full(lengths, float(number) if "float" in dtype else number, dtype=dtype)


# As `full`, for TensorFlow's AutoGraph.
_constant.autograph_info__ = {}  # type: ignore[attr-defined]


def _dynamo_compiles() -> bool:
    """Whether torch.compile is tracing this code instead of running it; it must not trace the value policy.

    It traces this file and runs the rest of gpuconst, including `torch_rules.compiling`.
    """
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    return compiler is not None and bool(compiler.is_dynamo_compiling())


def _read_shape(shape: Any) -> tuple[int, ...] | None:
    """Return the shape as ints, or None if a length is part of a graph, which only the backend can read."""
    lengths = shape if isinstance(shape, tuple | list) else (shape,)
    if any(length is None or isinstance(length, keras.KerasTensor) for length in lengths):
        raise TypeError(
            f"the initializer was called with the shape {shape}, which is not known yet; make the weight in the "
            "layer's build(), from the dimensions that are known there, or give every dimension as an int"
        )
    if all(isinstance(length, int | float | str | bytes | np.generic | np.ndarray) for length in lengths):
        return check_shape(shape, 1)[0]
    return None


_warned: set[type[Exception]] = set()


def _warn_once(error: Exception) -> None:
    """Warn why a first weight was left to Keras; for later ones, only the numbers in the message would differ."""
    if type(error) not in _warned:
        _warned.add(type(error))
        message = f"gpuconst could not fill a weight, Keras' own full does, for this one and the next: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _from_array(value: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return a copy of values given as an array: a weight must not alias its caller's array."""
    given = keras.ops.convert_to_tensor(value, dtype=dtype)
    given = keras.ops.cast(given, dtype)  # on torch, Keras has left a bfloat16 array what it is
    try:
        fits = np.broadcast_shapes(tuple(given.shape), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"Constant has a value of shape {tuple(given.shape)}, which does not broadcast to {shape}")
    return keras.ops.copy(keras.ops.broadcast_to(given, shape))


# One function per backend. Each makes a scalar the way Keras would, and looks at where it landed: whatever
# the scopes, defaults and environment variables, that tells which device is meant, which dtype the backend
# substitutes for the requested one, and whether there is memory at all. None means: leave it to Keras.


def _make_tensorflow(shape: tuple[int, ...], value: Any, dtype: str) -> Any:
    import tensorflow

    if dtype.startswith("float8"):  # which TensorFlow does not import through DLPack
        return None
    probe = keras.ops.zeros((), dtype=dtype)
    if not hasattr(probe, "numpy"):  # a graph is being built
        return None
    device = _tensorflow_device(probe.device)
    if device is None:
        return None
    tensor = _filled(shape, value, probe.dtype.name, device).to_tensorflow()
    # Host memory is imported to the first of several virtual CPUs; moving it between them copies nothing.
    return tensor if tensor.device == probe.device else tensorflow.identity(tensor)


def _tensorflow_device(name: str) -> str | None:
    job, _, device = name.rpartition("/device:")
    if "/job:localhost" not in job:  # another machine of a cluster
        return None
    kind, _, index = device.partition(":")
    return {"CPU": "cpu", "GPU": f"cuda:{index}"}.get(kind)


def _make_jax(shape: tuple[int, ...], value: Any, dtype: str) -> Any:
    import jax

    from .jax import as_jax, check_narrowed, cpu_device

    device = cpu_device()
    if device is not None:  # known without a probe, which would cost as much as the rest
        kept = jax.dtypes.canonicalize_dtype(resolve_dtype(dtype).numpy)
        if kept.name != dtype:
            check_narrowed(value, dtype)
        return as_jax(_filled(shape, value, kept, "cpu").to_numpy(), device)
    probe = keras.ops.zeros((), dtype=dtype)
    if probe.dtype.name != dtype:
        check_narrowed(value, dtype)
    if isinstance(probe, jax.core.Tracer) or len(probe.devices()) != 1:
        return None
    (device,) = probe.devices()
    if device.platform != "gpu" or jax.device_count() > 1:
        return None
    return _filled(shape, value, probe.dtype, f"cuda:{device.local_hardware_id}").to_jax()


def _make_torch(shape: tuple[int, ...], value: Any, dtype: str) -> Any:
    import torch

    probe = keras.ops.zeros((), dtype=dtype)
    if not has_memory(probe):  # keras.ops.full would read the value back from a meta tensor
        return keras.initializers.Constant(value)(shape, dtype)
    if probe.is_cuda:  # by torch's own allocator: it reserves the card, and another would compete with it
        tensor = fill(torch.empty(shape, dtype=probe.dtype, device=probe.device), value)
        debug(FILLED, select(str(probe.device)).backend, probe.device, tensor.data_ptr())
        return tensor
    if not probe.is_cpu:
        return None
    return _filled(shape, value, probe.dtype, "cpu").to_torch()


def _filled(shape: tuple[int, ...], value: Any, dtype: Any, device: str) -> Array:
    array = full(shape, value, dtype=dtype, device=device)
    debug(FILLED, array.backend, array.device, array.data_ptr())
    return array


_MAKERS: dict[str, Callable[[tuple[int, ...], Any, str], Any]] = {
    "jax": _make_jax,
    "tensorflow": _make_tensorflow,
    "torch": _make_torch,
}
