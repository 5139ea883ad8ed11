"""The one value policy: which values an element of a dtype can hold, and as which bytes.

Everything here runs on the host, before anything is allocated, so that a value means the same on every
device and in every framework, and a wrong one costs nothing.
"""

from __future__ import annotations

import math
import operator
import struct
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import ml_dtypes
import numpy as np

from .dtypes import DTYPES, DType
from .errors import brief

__all__ = ["check_shape", "default_dtype", "encode", "encode_each", "is_array", "is_number"]

_MAX_BYTES = 2**63 - 1
_MAX_NDIM = 64  # NumPy's limit

# The `struct` code for a value of a Python type in a dtype. One C call packs and range-checks; what it
# refuses takes the long way to a good message.
_CODES: dict[tuple[type, DType], str] = {
    **{(float, DTYPES[name]): code for name, code in [("float32", "f"), ("float64", "d")]},
    **{
        (int, DTYPES[name]): code
        for name, code in zip(
            ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"], "bhiqBHIQ", strict=True
        )
    },
}
_PACK: dict[DType, dict[type, Callable[[Any], bytes]]] = {
    dtype: {kind: struct.Struct(f"={code}").pack for (kind, its), code in _CODES.items() if its is dtype}
    for dtype in DTYPES.values()
}

_DEFAULTS = {bool: DTYPES["bool"], float: DTYPES["float32"], complex: DTYPES["complex64"]}


def check_shape(shape: Any, itemsize: int) -> tuple[tuple[int, ...], int]:
    """Return `shape` as a tuple of ints, and the bytes that it takes.

    Parameters
    ----------
    shape : int or sequence of int
        The requested shape; anything with ``__index__`` counts as an int, except bools.
    itemsize : int
        Bytes in one element.

    Returns
    -------
    dims : tuple of int
        The shape.
    nbytes : int
        Bytes of all elements.

    Raises
    ------
    TypeError
        If `shape` is neither an int nor a sequence of ints.
    ValueError
        If a dimension is negative, or there are more than 64.
    OverflowError
        If the array would have more than ``2**63 - 1`` bytes.
    """
    if type(shape) is int and 0 <= shape <= _MAX_BYTES // itemsize:
        return (shape,), shape * itemsize
    if type(shape) is tuple:
        nbytes = itemsize
        for length in shape:
            if type(length) is not int or length < 1:
                break
            nbytes *= length
        else:
            if nbytes <= _MAX_BYTES and len(shape) <= _MAX_NDIM:
                return shape, nbytes
    dims = _dimensions(shape)
    for length in dims:
        if length < 0:
            raise ValueError(f"shape {dims} has a negative dimension ({length})")
    if len(dims) > _MAX_NDIM:
        raise ValueError(f"a shape has at most {_MAX_NDIM} dimensions, not {len(dims)}")
    if math.prod(length for length in dims if length) * itemsize > _MAX_BYTES:
        said = "has"
        if 0 in dims:  # under the same limit, as in NumPy: strides must stay representable
            said = "holds nothing, but its other dimensions would have"
        raise OverflowError(f"shape {dims} with {itemsize}-byte elements {said} more than 2**63 - 1 bytes")
    return dims, math.prod(dims) * itemsize


def _dimensions(shape: Any) -> tuple[int, ...]:
    if _is_bool(shape) or isinstance(shape, str | bytes | bytearray | Mapping | Set):
        raise TypeError(f"a shape is an int or a sequence of ints, not {brief(shape)}")
    if not getattr(shape, "ndim", 0):  # a one-element tensor has an index, whatever its dimensions
        try:
            return (operator.index(shape),)
        except TypeError as error:
            if type(error) is not TypeError:  # JAX's own error says best what is wrong with a traced length
                raise
    try:
        lengths = list(shape)
    except TypeError:
        raise TypeError(f"a shape is an int or a sequence of ints, not {brief(shape)}") from None
    return tuple(_dimension(length, shape) for length in lengths)


def _dimension(length: Any, shape: Any) -> int:
    if not _is_bool(length) and hasattr(length, "__index__"):
        try:
            return operator.index(length)
        except TypeError as error:
            if type(error) is not TypeError:
                raise
    raise TypeError(f"a dimension of a shape is an int, not {brief(length)} (in {brief(shape)})")


def _is_bool(value: Any) -> bool:
    """Whether a value is a bool, including those of all libraries; most of these have an ``__index__``."""
    return isinstance(value, bool) or (getattr(value, "ndim", None) == 0 and "bool" in str(getattr(value, "dtype", "")))


def default_dtype(value: Any) -> DType:
    """Return the dtype that a value gets when none is given.

    bool gives bool, int gives int64, float gives float32 and complex gives complex64; a NumPy scalar
    counts as its Python kind.

    Parameters
    ----------
    value : scalar
        A Python or NumPy scalar, or a 0-d NumPy array.

    Returns
    -------
    DType

    Raises
    ------
    TypeError
        If the value is not such a scalar, or is ``bytes``, which say nothing about their dtype.
    OverflowError
        If an int does not fit int64.
    """
    known = _DEFAULTS.get(type(value))
    if known is not None:
        return known
    if isinstance(value, bytes):
        raise TypeError("fill_value=bytes are the raw bits of one element: give the dtype they are of")
    number = _number(value)
    if isinstance(number, bool):
        return _DEFAULTS[bool]
    if isinstance(number, int):
        if not -(2**63) <= number < 2**63:
            if 0 <= number < 2**64:
                wider = "pass dtype='uint64'"
            else:
                wider = "no dtype holds it" if _is_beyond_all(number) else "pass a floating dtype"
            raise OverflowError(f"{_shown(number)} does not fit int64, the default dtype of an int; {wider}")
        return DTYPES["int64"]
    return _DEFAULTS[complex if isinstance(number, complex) else float]


def encode(value: Any, dtype: DType) -> bytes:
    """Return the bytes of one element of `dtype` that holds `value`.

    Rounding is that of ``numpy.asarray(value).astype(dtype)``; underflow to zero is silent, as there.

    Parameters
    ----------
    value : scalar or bytes
        A Python or NumPy scalar or 0-d NumPy array. A NumPy scalar that already has the dtype is
        copied by its bytes (NaN payloads survive). ``bytes`` are the raw bits of one element.
    dtype : DType
        The dtype to encode for.

    Returns
    -------
    bytes
        ``dtype.itemsize`` bytes in native order.

    Raises
    ------
    OverflowError
        If the value does not fit the dtype.
    TypeError
        If the value is not a number or is of the wrong kind: a fraction for an int, complex for a real.
    ValueError
        If ``bytes`` are not ``dtype.itemsize`` long.
    """
    pack = _PACK[dtype].get(type(value))
    if pack is not None:
        try:
            return pack(value)
        except (struct.error, OverflowError):
            pass  # the long way says what is wrong
    if isinstance(value, bytes):
        if len(value) != dtype.itemsize:
            raise ValueError(f"fill_value has {len(value)} bytes, one {dtype.name} element has {dtype.itemsize}")
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.generic) and value.dtype == dtype.numpy:
        return value.tobytes()
    number = _number(value)
    if dtype.numpy.kind in "biu":
        return _encode_integer(number, dtype)
    return _encode_inexact(number, dtype)


def encode_each(values: Sequence[Any], dtype: DType) -> bytes:
    """Return what `encode` returns for each of many values, concatenated.

    Values of one type are encoded together, in a tenth of the time; for dtypes that Python itself
    cannot pack, in a hundredth.

    Parameters
    ----------
    values : sequence of scalar or bytes
        As for `encode`.
    dtype : DType
        The dtype to encode for.

    Returns
    -------
    bytes
        ``len(values) * dtype.itemsize`` bytes.

    Raises
    ------
    OverflowError, TypeError, ValueError
        As for `encode`, for the first value that it refuses.
    """
    kinds = set(map(type, values))
    kind = kinds.pop() if len(kinds) == 1 else None
    code = _CODES.get((kind, dtype)) if kind is not None else None
    if code is not None:
        try:
            return struct.pack(f"={len(values)}{code}", *values)
        except (struct.error, OverflowError):
            pass  # the long way says what is wrong
    elif kind is float and dtype.numpy.kind not in "biuc" and dtype.name != "float8_e8m0fnu":
        given = np.array(values)
        with np.errstate(all="ignore"):
            rounded = given.astype(dtype.numpy)
        kept, finite = rounded.astype(np.float64), np.isfinite(given)
        if np.isfinite(kept[finite]).all() and np.array_equal(kept[~finite], given[~finite], equal_nan=True):
            return rounded.tobytes()
    return b"".join([encode(value, dtype) for value in values])


def is_array(value: Any) -> bool:
    """Whether a value is an array of numbers, of any library; only NumPy's are examined."""
    if isinstance(value, np.ndarray):
        return (value.dtype.kind in "biufc" or value.dtype in _ML_DTYPES) and not np.any(getattr(value, "mask", False))
    return hasattr(value, "shape") and not isinstance(value, type | np.generic | memoryview)


def is_number(value: Any) -> bool:
    """Whether a value is of a kind that `encode` takes, other than ``bytes``."""
    try:
        _number(value)
    except TypeError:
        return False
    return True


def _number(value: Any) -> int | float | complex:
    """Return a scalar as the Python number it is, bool included."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.generic):
        if value.dtype in _ML_DTYPES:
            value = float(value)
        elif value.dtype.kind in "biufc":
            value = value.item()
    if isinstance(value, int | float | complex):
        return value
    raise _no_number(value)


def _no_number(value: Any) -> TypeError:
    if getattr(value, "ndim", 0) and not isinstance(value, type):  # a class has the attributes of its instances
        return TypeError(
            f"fill_value is {type(value).__name__} of shape {tuple(value.shape)}, expected a scalar; "
            "to copy many values, assign them with the library that the array is of: x[...] = values"
        )
    if isinstance(value, type | np.flexible | np.datetime64 | np.timedelta64):
        hint = ""
    elif isinstance(value, np.complexfloating):
        hint = "; pass complex(x)"
    elif hasattr(value, "mask"):
        hint = "; a masked element has no value"
    elif hasattr(value, "item") and not isinstance(value, np.generic):
        hint = "; pass x.item()"
    elif hasattr(value, "__float__"):
        hint = "; pass float(x)"
    else:
        hint = ""
    return TypeError(
        f"fill_value is {brief(value)} of type {type(value).__name__}, "
        f"expected bool, int, float, complex, a NumPy scalar or bytes{hint}"
    )


_ML_DTYPES = frozenset(row.numpy for row in DTYPES.values() if not row.native)


def _shown(number: int | float | complex) -> str:
    # Python refuses to write out ints of thousands of digits.
    return f"an int of {number.bit_length()} bits" if isinstance(number, int) and abs(number) >> 512 else repr(number)


def _is_beyond_all(number: int | float | complex) -> bool:
    """Whether a number is too large for every dtype."""
    return isinstance(number, int) and abs(number) > sys.float_info.max


def _real(number: int | float | complex, dtype: DType) -> int | float:
    if not isinstance(number, complex):
        return number
    if number.imag != 0:  # true for nan too
        raise TypeError(f"{number!r} is complex, {dtype.name} is real; pass its .real or a complex dtype")
    return number.real


def _encode_integer(number: int | float | complex, dtype: DType) -> bytes:
    number = _real(number, dtype)
    low, high = (0, 1) if dtype.name == "bool" else (np.iinfo(dtype.numpy).min, np.iinfo(dtype.numpy).max)
    if isinstance(number, float):
        if not math.isfinite(number):
            raise OverflowError(f"{number!r} does not fit {dtype.name}; pass a finite value or a floating dtype")
        if not number.is_integer():
            way_out = "bool(x)" if dtype.name == "bool" else "round(x)"
            raise TypeError(
                f"{number!r} has a fraction, {dtype.name} holds whole numbers; pass {way_out} or a floating dtype"
            )
    number = int(number)
    if not low <= number <= high:
        if dtype.name == "bool":
            way_out = "pass bool(x)"
        elif -(2**63) <= number < 2**63:
            way_out = f'to wrap it, pass numpy.int64({number}).astype("{dtype.name}")'
        else:
            way_out = f"pass a value in that range{'' if _is_beyond_all(number) else ', or a wider or floating dtype'}"
        raise OverflowError(f"{_shown(number)} does not fit {dtype.name} ({low} … {high}); {way_out}")
    return np.array(number, dtype.numpy).tobytes()


def _encode_inexact(number: int | float | complex, dtype: DType) -> bytes:
    if dtype.numpy.kind != "c":
        number = _real(number, dtype)
    try:
        given = complex(number)
    except OverflowError:  # an int beyond float64
        raise _does_not_fit(number, dtype) from None
    # NumPy holds an int beyond 64 bits as an object, which the ml_dtypes formats do not take.
    exact = number if not isinstance(number, int) or -(2**63) <= number < 2**64 else float(number)
    with np.errstate(all="ignore"):
        rounded = np.asarray(exact).astype(dtype.numpy)
    kept = complex(rounded)
    if not (_survives(given.real, kept.real) and _survives(given.imag, kept.imag)):
        raise _does_not_fit(number, dtype)
    if dtype.name == "float8_e8m0fnu" and given.real < _E8M0_SMALLEST:  # casts round up to it, even zero
        raise _does_not_fit(number, dtype)
    return rounded.tobytes()


_E8M0_SMALLEST = 2.0**-127


def _survives(given: float, kept: float) -> bool:
    """Whether rounding kept a number a number, an infinity an infinity and a nan a nan."""
    if math.isfinite(given):
        return math.isfinite(kept)
    return math.isnan(kept) if math.isnan(given) else kept == given


def _does_not_fit(number: int | float | complex, dtype: DType) -> OverflowError:
    if dtype.numpy.kind == "c":
        limit, bits = np.finfo(dtype.numpy).max, "complex128"
    else:
        limit, bits = ml_dtypes.finfo(dtype.numpy).max, "float64"  # type: ignore[no-untyped-call]
    if dtype.name == "float8_e8m0fnu":
        span = f"powers of two from {_E8M0_SMALLEST:.4g} to {float(limit):.4g}, and nan; it has no zero"
    else:
        span = f"±{float(limit):.6g}"
        if not isinstance(number, int) and not np.isfinite(number):
            span += ", without infinity"
    wider = "" if _is_beyond_all(number) else f", or a wider dtype such as {bits}"
    return OverflowError(f"{_shown(number)} does not fit {dtype.name} ({span}); pass a value in that range{wider}")
