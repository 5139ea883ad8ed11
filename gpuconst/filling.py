"""Memory that is there already, filled in place: `fill`."""

from __future__ import annotations

from typing import Any, TypeVar

from .array import Array
from .backends import select
from .kernels.runs import Region
from .streams import stream_handle
from .torch_rules import check_writable, has_memory, is_tensor, mark_written
from .values import encode
from .views import View, view_of

__all__ = ["fill"]

T = TypeVar("T")


def fill(x: T, fill_value: Any, *, stream: Any = None) -> T:
    """Fill an array with a constant, in place, and return it.

    Everything is checked before anything is written. On CUDA the fill is asynchronous, on the owner's
    current stream.

    Parameters
    ----------
    x : array
        Any writable array of NumPy, torch or CuPy, a gpuconst `Array`, or any object with DLPack, the
        buffer protocol or ``__cuda_array_interface__``; contiguous, strided, flipped or expanded. Of a
        DTensor the local part is filled. A meta or fake tensor, which has no memory, is left alone.
    fill_value : scalar or bytes
        As for `full`, held to the dtype of `x`.
    stream : optional
        The CUDA stream to fill on, instead of the owner's current one.

    Returns
    -------
    array
        `x` itself.

    Raises
    ------
    TypeError
        If `x` is no array, or the value is of another kind than its dtype.
    ValueError
        If `x` is read-only or immutable (JAX, TensorFlow), describes impossible memory, or a stream is
        given for CPU memory.
    OverflowError
        If the value does not fit the dtype of `x`.
    RuntimeError
        If autograd is recording and `x` requires grad, as `torch.Tensor.fill_` does.
    DeviceUnavailableError
        If no backend can reach the memory of `x`.
    """
    is_torch = is_tensor(x)
    if is_torch and not has_memory(x):
        return x
    view = writable_view(x)
    element = encode(fill_value, view.dtype)
    place = select(view.device)
    handle = view.stream if stream is None else stream_handle(stream, place)
    if handle != view.stream and not is_torch:
        place.module.order(view.stream, handle, place.ordinal)
    place.module.fill([Region(view.address, view.shape, view.strides, element)], place.ordinal, handle)
    if is_torch:
        mark_written([x])
    elif isinstance(x, Array):
        x._stream = handle
    return x


def writable_view(x: Any) -> View:
    """Look at an array that is about to be written.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If it must not be written; the message says why and what to do.
    """
    if is_tensor(x):
        check_writable(x)
    view = view_of(x)
    if view.read_only is not None:
        raise ValueError(f"cannot fill {type(x).__name__}: {view.read_only}")
    return view
