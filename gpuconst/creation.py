"""New memory, filled: `full`, `zeros`, `ones`."""

from __future__ import annotations

import math
from typing import Any

from .array import Array
from .backends import select
from .dtypes import resolve_dtype
from .errors import OutOfMemoryError
from .streams import stream_handle
from .values import check_shape, default_dtype, encode

__all__ = ["full", "ones", "zeros"]


def full(shape: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, stream: Any = None) -> Array:
    """Return a new array filled with a constant.

    Shape and value are checked, and the value encoded, on the host before anything is allocated.

    Parameters
    ----------
    shape : int or sequence of int
        Elements along each dimension.
    fill_value : scalar or bytes
        A Python or NumPy scalar or 0-d NumPy array, or ``bytes``: the raw bits of one element.
    dtype : optional
        A name, a NumPy or ml_dtypes dtype, or the dtype object of a framework. By default bool gives
        bool, int int64, float float32 and complex complex64.
    device : str, optional
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. By default a GPU where there is a usable one and the
        CPU otherwise; `Array.device` says which, and `info` why.
    stream : optional
        The CUDA stream to fill on: an int handle, a stream of CuPy, torch, Numba or cuda.core, or
        anything with ``__cuda_stream__``. By default the backend's current one.

    Returns
    -------
    Array
        C-ordered, at an address that is a multiple of 256 bytes.

    Raises
    ------
    TypeError
        If the shape is no int or sequence of ints, the dtype unknown, or the value of another kind
        than the dtype (a fraction for an int, complex for a real, no number).
    ValueError
        If a dimension is negative, the device has no such name, ``bytes`` are not one element long,
        or a stream is given for the CPU.
    OverflowError
        If the value does not fit the dtype, or the array would have more than ``2**63 - 1`` bytes.
    DeviceUnavailableError
        If the device was named and cannot be used.
    OutOfMemoryError
        If the device has no memory left.

    Examples
    --------
    >>> import gpuconst
    >>> gpuconst.full((2, 3), 0.1, dtype="bfloat16", device="cpu").to_numpy()
    array([[0.100098, 0.100098, 0.100098],
           [0.100098, 0.100098, 0.100098]], dtype=bfloat16)
    """
    row = default_dtype(fill_value) if dtype is None else resolve_dtype(dtype)
    dims = check_shape(shape, row.itemsize)
    element = encode(fill_value, row)
    place = select(device)
    handle = stream_handle(stream, place)
    try:
        carrier, address = place.module.full(dims, row.carrier, element, place.ordinal, handle)
    except MemoryError as error:
        nbytes = math.prod(dims) * row.itemsize
        raise OutOfMemoryError(
            f"{place.device} has no memory for {nbytes:,} bytes (shape {dims}, {row.name}): {error}"
        ) from error
    return Array(carrier, address, dims, row, place, handle)


def zeros(shape: Any, *, dtype: Any = "float32", device: Any = None, stream: Any = None) -> Array:
    """Return a new array of zeros; `full` with 0.0, and float32 by default.

    Parameters
    ----------
    shape : int or sequence of int
        Elements along each dimension.
    dtype, device, stream : optional
        As for `full`.

    Returns
    -------
    Array

    Raises
    ------
    OverflowError
        If the dtype has no zero (float8_e8m0fnu); otherwise as for `full`.
    """
    return full(shape, 0.0, dtype=dtype, device=device, stream=stream)


def ones(shape: Any, *, dtype: Any = "float32", device: Any = None, stream: Any = None) -> Array:
    """Return a new array of ones; `full` with 1.0, and float32 by default.

    Parameters
    ----------
    shape : int or sequence of int
        Elements along each dimension.
    dtype, device, stream : optional
        As for `full`.

    Returns
    -------
    Array
    """
    return full(shape, 1.0, dtype=dtype, device=device, stream=stream)
