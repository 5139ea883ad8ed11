"""Foreign arrays as addresses and integers, whatever their library and protocol.

Frameworks are recognised among the modules already imported; none is imported to look at an object.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .array import Array
from .dlpack import CPU, CUDA, IS_COPIED, READ_ONLY, Tensor, read_capsule
from .dtypes import DType, dtype_from_dlpack, resolve_dtype
from .kernels import cuda_driver
from .kernels.runs import contiguous_strides
from .torch_rules import are_plain, has_memory, is_tensor, keeps_data_elsewhere, local_part

__all__ = ["View", "extents", "shares_memory", "view_of"]

_CUDA_HOST, _CUDA_MANAGED = 3, 13  # DLDeviceType
#: How much work NumPy does to find out whether strided arrays intersect: hundredths of a second.
_MAX_WORK = 1_000_000
_READ_ONLY = "it is read-only; fill a copy of it"


class View(NamedTuple):
    """Memory that another library owns.

    Attributes
    ----------
    address : int
        Of the element at index (0, 0, …).
    shape, strides : tuple of int
        Elements along each dimension, and bytes from one to the next. They describe the memory, not the
        array: a contiguous array may have fewer dimensions here.
    dtype : DType
        The dtype of the elements.
    device : str
        ``"cpu"`` or ``"cuda:N"``.
    owner : object
        Object that keeps the memory alive.
    read_only : str or None
        Why it must not be written, or None.
    stream : int or None
        Handle of the CUDA stream that orders work on the memory; None if that is the current stream of its
        framework, if there is no such stream, and on the CPU.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: str
    owner: Any
    read_only: str | None = None
    stream: int | None = None


def view_of(x: Any) -> View:
    """Return a view of the memory of an array-like object, without copying.

    Parameters
    ----------
    x : object
        A gpuconst `Array`, a NumPy, CuPy or JAX array, a torch or TensorFlow tensor, or anything with
        ``__dlpack__``, ``__cuda_array_interface__``, ``__array_interface__`` or the buffer protocol.

    Returns
    -------
    View

    Raises
    ------
    TypeError
        If `x` is none of these, or its dtype is not in the table.
    ValueError
        If it describes memory that cannot exist, its memory is gone, or it is a JAX array on several devices.
    BufferError
        If it refuses to export its memory, or exports a copy.
    """
    kind: Any = type(x)
    return _check(_reader(kind)(x))


def shares_memory(a: Any, b: Any) -> bool:
    """Return whether two arrays have any byte of memory in common.

    Parameters
    ----------
    a, b : object
        Arrays of any library, as for `fill`, including immutable ones (JAX, TensorFlow).

    Returns
    -------
    bool
        False if they are on different devices, or one of them is empty. Also True if their address
        ranges intersect and it would take too long to find out whether their elements do.

    Raises
    ------
    TypeError
        If one of them is not an array.
    ValueError
        If one of them has lost its memory, or is a JAX array on several devices.
    """
    first, second = view_of(a), view_of(b)
    if first.device != second.device:
        return False
    try:
        return bool(np.shares_memory(_outline(first), _outline(second), max_work=_MAX_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def extents(arrays: Sequence[Any]) -> np.ndarray:
    """Return two rows: the address of each array's memory, and its bytes (of a tensor) or elements (of any other).

    Parameters
    ----------
    arrays : sequence of array
        Meta and fake tensors, and arrays that have lost their memory, are at address 0.
    """
    found = np.empty((2, len(arrays)), np.uint64)
    if len(arrays) and is_tensor(arrays[0]) and are_plain(arrays):
        found[0] = np.fromiter(map(type(arrays[0]).data_ptr, arrays), np.uint64, len(arrays))
        found[1] = np.fromiter(map(operator.attrgetter("nbytes"), arrays), np.uint64, len(arrays))
    else:  # a DTensor's own address is not that of any memory
        found.T[:] = np.array([_extent(x) for x in arrays], np.uint64).reshape(-1, 2)
    return found


def _extent(x: Any) -> tuple[int, int]:
    if is_tensor(x):
        tensor = local_part(x)
        return (tensor.data_ptr(), tensor.nbytes) if has_memory(tensor) else (0, 0)
    try:
        view = view_of(x)
    except (TypeError, ValueError, BufferError):
        return 0, 0
    return view.address, math.prod(view.shape)


def _outline(view: View) -> np.ndarray:
    """Return a NumPy array at the view's addresses, even CUDA ones: for arithmetic only, never to be read."""

    class Outline:
        __array_interface__ = {
            "version": 3,
            "data": (view.address, True),
            "shape": view.shape,
            "strides": view.strides,
            "typestr": f"|V{view.dtype.itemsize}",
        }

    return np.asarray(Outline())


@functools.lru_cache(maxsize=256)
def _reader(kind: type) -> Callable[[Any], View]:
    """Return the function that reads objects of a type."""
    if issubclass(kind, Array):
        return _read_array
    if issubclass(kind, np.ndarray):
        return _read_numpy
    if issubclass(kind, np.generic):
        return _read_scalar
    if issubclass(kind, type):  # a class has the attributes of its instances
        return _refuse
    for module, name, read in _FRAMEWORKS:
        if issubclass(kind, getattr(sys.modules.get(module), name, ())):
            return read
    if hasattr(kind, "__cuda_array_interface__"):
        return _read_cuda_interface
    if hasattr(kind, "__dlpack__"):
        return _read_dlpack
    return _read_buffer


def _read_array(x: Array) -> View:
    return View(x.data_ptr(), (x.size,), (x.itemsize,), x._dtype, x.device, x, None, x._stream)


def _read_numpy(x: Any) -> View:
    x = np.asarray(x)  # a subclass may say anything of itself
    dtype = resolve_dtype(x.dtype)
    read_only = None if x.flags.writeable else _READ_ONLY
    return View(x.__array_interface__["data"][0], x.shape, x.strides, dtype, "cpu", x, read_only)


def _read_scalar(x: Any) -> View:
    # NumPy reports the address of a temporary copy, which is gone by the next line.
    raise TypeError(f"{x!r} is a NumPy scalar, which is immutable; expected an array, of shape () if need be")


def _read_torch(x: Any) -> View:
    tensor = local_part(x)
    if keeps_data_elsewhere(tensor):
        raise TypeError(f"{type(tensor).__name__} keeps its data in other tensors; take those")
    if not (tensor.is_cpu or tensor.is_cuda):
        raise TypeError(f"the tensor is on {tensor.device}, expected a CPU or CUDA tensor")
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:
        raise TypeError(f"the tensor has no memory of its own ({error})") from None
    dtype = resolve_dtype(tensor.dtype)
    itemsize = dtype.itemsize
    if tensor.is_contiguous():  # one dimension says the same, and is faster
        count = tensor.numel()
        shape, strides, last = (count,), (itemsize,), count - 1
    elif tensor.is_nested:
        raise TypeError("the tensor is nested and has gaps; take the tensors of its unbind(), or its contiguous()")
    else:
        shape, strides = tuple(tensor.shape), tuple([stride * itemsize for stride in tensor.stride()])
        last = sum([(length - 1) * stride for length, stride in zip(shape, tensor.stride(), strict=True)])
    stored, needed = tensor.untyped_storage().nbytes(), (tensor.storage_offset() + last + 1) * itemsize
    if needed > stored and tensor.numel():
        raise ValueError(f"the tensor's storage was resized to {stored} bytes, it needs {needed}")
    return View(address, shape, strides, dtype, f"cuda:{tensor.get_device()}" if tensor.is_cuda else "cpu", x)


def _read_jax(x: Any) -> View:
    if isinstance(x, sys.modules["jax.core"].Tracer):
        raise TypeError(f"{x!r} is being traced and has no memory")
    if x.is_deleted():
        raise ValueError("the JAX array was deleted (donated, or by delete()) and has no memory")
    resolve_dtype(x.dtype)  # JAX's own exporter says nothing clear about int4 and random keys
    if len(x.devices()) > 1:
        raise ValueError(
            f"the JAX array lies on {len(x.devices())} devices, and is immutable; look at x.addressable_shards[i].data"
        )
    return _read_dlpack(x)._replace(read_only="JAX arrays are immutable; make a new one: gpuconst.full(...).to_jax()")


def _read_tensorflow(x: Any) -> View:
    resolve_dtype(x.dtype)  # TensorFlow's exporter aborts the process on strings
    way_out = "make a new one: gpuconst.full(...).to_tensorflow()"
    if isinstance(x, sys.modules["tensorflow"].Variable):
        x, way_out = x.value(), f"{way_out}, and hand it to variable.assign"
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{x!r} is symbolic and has no memory")
    return _read_dlpack(x)._replace(read_only=f"TensorFlow's tensors are immutable; {way_out}")


def _read_proxy(x: Any) -> View:
    raise TypeError(f"{x!r} stands for a tensor in a graph of torch.fx and has no memory; use torch.full_like")


def _read_cupy(x: Any) -> View:
    shape, strides = ((x.size,), (x.itemsize,)) if x.flags.c_contiguous else (x.shape, x.strides)
    return View(x.data.ptr, shape, strides, resolve_dtype(x.dtype), f"cuda:{x.device.id}", x)


def _read_cuda_interface(x: Any) -> View:
    interface = x.__cuda_array_interface__
    try:
        (address, read_only), shape = interface["data"], tuple(map(operator.index, interface["shape"]))
        dtype = resolve_dtype(interface["typestr"])
        strides = interface.get("strides")
        strides = tuple(map(operator.index, strides)) if strides else contiguous_strides(shape, dtype.itemsize)
        address = operator.index(address)
    except (KeyError, TypeError, ValueError) as error:
        raise TypeError(f"{type(x).__name__}.__cuda_array_interface__ cannot be read: {error!r}") from error
    if interface.get("mask") is not None:
        raise TypeError("the array is masked; fill its data and its mask each on its own")
    index = cuda_driver.device_of(address) if math.prod(shape) else 0
    why = _READ_ONLY if read_only else None
    return View(address, shape, strides, dtype, f"cuda:{index}", x, why, interface.get("stream"))


def _read_dlpack(x: Any) -> View:
    place = x.__dlpack_device__()
    try:
        kind = int(place[0])
    except (TypeError, ValueError, LookupError):
        raise TypeError(f"{type(x).__name__}.__dlpack_device__() is {place!r}, expected (type, index)") from None
    arguments = {"stream": 1} if kind == CUDA else {}
    try:
        capsule = x.__dlpack__(**arguments, max_version=(1, 1), copy=False)
    except TypeError:  # an exporter from before DLPack 1.0
        capsule = x.__dlpack__(**arguments)
    tensor, flags = read_capsule(capsule)
    if flags & IS_COPIED:
        raise BufferError(f"{type(x).__name__}.__dlpack__ answered with a copy, although copy=False was asked")
    if tensor.device_type != kind:
        raise ValueError(f"the object says that it is on DLPack device type {kind}, its tensor {tensor.device_type}")
    device = _dlpack_device(tensor)
    dtype = dtype_from_dlpack(tensor.code, tensor.bits)
    if dtype is None or tensor.lanes != 1:
        raise TypeError(
            f"the DLPack tensor has type code {tensor.code} with {tensor.bits} bits and {tensor.lanes} lanes, "
            "which is no dtype here"
        )
    if not 0 <= tensor.ndim <= 64:
        raise ValueError(f"the DLPack tensor says that it has {tensor.ndim} dimensions")
    if tensor.ndim and not tensor.shape:
        raise ValueError(f"the DLPack tensor has {tensor.ndim} dimensions but no shape")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim))
    else:
        strides = contiguous_strides(shape, dtype.itemsize)
    address = (tensor.data or 0) and tensor.data + tensor.byte_offset
    stream = 0 if kind == CUDA else None  # the one that the exporter was told to synchronise with
    return View(address, shape, strides, dtype, device, capsule, _READ_ONLY if flags & READ_ONLY else None, stream)


def _dlpack_device(tensor: Tensor) -> str:
    if tensor.device_type in (CPU, _CUDA_HOST):
        return "cpu"
    if tensor.device_type == CUDA:
        return f"cuda:{tensor.device_id}"
    name = "CUDA managed memory" if tensor.device_type == _CUDA_MANAGED else f"DLPack device type {tensor.device_type}"
    raise TypeError(f"the tensor is in {name}, expected CPU or CUDA device memory")


def _read_buffer(x: Any) -> View:
    if hasattr(x, "__cuda_array_interface__"):  # set on the object, not on its type
        return _read_cuda_interface(x)
    if hasattr(x, "__array_interface__") or hasattr(x, "__array_struct__"):
        return _read_numpy(x)
    try:
        exported = np.asarray(memoryview(x))
    except TypeError:
        return _refuse(x)
    except ValueError as error:
        raise TypeError(
            f"{type(x).__name__} has elements of the buffer format {memoryview(x).format!r}, which is no dtype here"
        ) from error
    return _read_numpy(exported)


def _refuse(x: Any) -> View:
    hint = ""
    if hasattr(x, "assign") and hasattr(x, "trainable"):
        hint = "; for a Keras variable use variable.assign, or take its value"
    elif hasattr(x, "parameters"):
        hint = "; of a module, gpuconst.fill_many(x.parameters(), ...)"
    elif isinstance(x, list | tuple):
        hint = "; for several arrays use gpuconst.fill_many"
    raise TypeError(
        f"{type(x).__name__} is no array; expected a torch tensor, a NumPy or CuPy array, a gpuconst.Array, "
        f"or an object with DLPack or the buffer protocol{hint}"
    ) from None


_FRAMEWORKS: list[tuple[str, str, Callable[[Any], View]]] = [
    ("torch", "Tensor", _read_torch),
    ("torch.fx", "Proxy", _read_proxy),
    ("cupy", "ndarray", _read_cupy),
    ("jax", "Array", _read_jax),
    ("jax.core", "Tracer", _read_jax),
    ("tensorflow", "Tensor", _read_tensorflow),
    ("tensorflow", "Variable", _read_tensorflow),
]


def _check(view: View) -> View:
    """Refuse a view of memory that cannot exist."""
    address, shape, strides, dtype = view[:4]
    if len(shape) != len(strides):
        raise ValueError(f"the array says it has shape {shape} and strides {strides}: their lengths differ")
    low, high = address, address + dtype.itemsize
    for axis, stride in enumerate(strides):
        if shape[axis] < 0:
            raise ValueError(f"the array says it has shape {shape}: a dimension is negative")
        if stride < 0:
            low += (shape[axis] - 1) * stride
        else:
            high += (shape[axis] - 1) * stride
    if 0 in shape:
        return view
    if not address:
        raise ValueError(
            f"the array has shape {shape} but its address is null: its memory was freed, or it never had any"
        )
    if low < 4096 or high > 2**63:
        raise ValueError(f"the array says it lies at {low:#x} … {high:#x}: no memory is there")
    return view
