"""The dtypes that can be filled, and every name they go by."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .errors import brief

__all__ = ["DTYPES", "DType", "dtype_from_dlpack", "resolve_dtype"]


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One row of the dtype table.

    Attributes
    ----------
    name : str
        The NumPy or ml_dtypes name.
    numpy : numpy.dtype
        The native-endian dtype that elements of this kind have in NumPy.
    carrier : numpy.dtype
        The dtype that is exported through DLPack: `numpy` itself or, for the ml_dtypes formats, which
        exporters cannot name, the unsigned integer of the same width.
    itemsize : int
        Bytes in one element.
    dlpack_code, dlpack_bits : int
        The `DLDataType` of the DLPack specification.
    native : bool
        Whether NumPy itself can name this dtype (false for the ml_dtypes formats).
    """

    name: str
    numpy: np.dtype[Any]
    carrier: np.dtype[Any]
    itemsize: int
    dlpack_code: int
    dlpack_bits: int
    native: bool


# DLDataTypeCode of dlpack.h.
_KINDS = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_EXTENDED = {
    "bfloat16": 4,
    "float8_e3m4": 7,
    "float8_e4m3": 8,
    "float8_e4m3b11fnuz": 9,
    "float8_e4m3fn": 10,
    "float8_e4m3fnuz": 11,
    "float8_e5m2": 12,
    "float8_e5m2fnuz": 13,
    "float8_e8m0fnu": 14,
}


def _native(name: str) -> DType:
    dtype = np.dtype(name)
    return DType(name, dtype, dtype, dtype.itemsize, _KINDS[dtype.kind], dtype.itemsize * 8, native=True)


def _extended(name: str, code: int) -> DType:
    dtype = np.dtype(getattr(ml_dtypes, name))
    carrier = np.dtype(f"uint{dtype.itemsize * 8}")
    return DType(name, dtype, carrier, dtype.itemsize, code, dtype.itemsize * 8, native=False)


#: Every supported dtype, by name.
DTYPES: dict[str, DType] = {
    row.name: row
    for row in [
        *map(_native, ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]),
        *map(_native, ["float16", "float32", "float64", "complex64", "complex128"]),
        *(_extended(name, code) for name, code in _EXTENDED.items()),
    ]
}

_BY_DLPACK = {(row.dlpack_code, row.dlpack_bits): row for row in DTYPES.values()}
_ALIASES: dict[Any, DType] = {
    **DTYPES,
    **{row.numpy: row for row in DTYPES.values()},
    **{row.numpy.type: row for row in DTYPES.values()},
}


def dtype_from_dlpack(code: int, bits: int) -> DType | None:
    """Return the row with this DLPack type code and width, or None."""
    return _BY_DLPACK.get((code, bits))


def resolve_dtype(dtype: Any) -> DType:
    """Return the table row that `dtype` means.

    Parameters
    ----------
    dtype : object
        A name, a NumPy dtype or scalar type, an ml_dtypes type, or the dtype object of torch, JAX or
        TensorFlow. No framework is imported to find it.

    Returns
    -------
    DType

    Raises
    ------
    TypeError
        If `dtype` is not in the table, or is in foreign byte order.
    """
    try:
        return _ALIASES[dtype]
    except (KeyError, TypeError):  # unknown, or not hashable
        return _resolve_foreign(dtype)


def _resolve_foreign(dtype: Any) -> DType:
    # The attribute is missing while another thread is still importing the framework.
    torch_dtype: Any = getattr(sys.modules.get("torch"), "dtype", ())
    tensorflow_dtype: Any = getattr(sys.modules.get("tensorflow"), "DType", ())
    found: Any = dtype
    if isinstance(dtype, torch_dtype):
        found = str(dtype).removeprefix("torch.")
        if found in DTYPES:
            _ALIASES[dtype] = DTYPES[found]  # needed by every fill; TensorFlow's compare equal to ints
            return DTYPES[found]
    elif isinstance(dtype, tensorflow_dtype):
        found = dtype.name
    elif not isinstance(dtype, str) and isinstance(getattr(dtype, "dtype", None), np.dtype):
        found = dtype.dtype  # jax.numpy.float32 and the like
    if found is not None:
        with contextlib.suppress(TypeError, ValueError, SyntaxError):  # NumPy parses strings, and reads attributes
            found = np.dtype(found)
    if isinstance(found, np.dtype) and not found.isnative and found.newbyteorder("=") in _ALIASES:
        raise TypeError(
            f"dtype {found.str!r} is not in this machine's byte order; "
            f"pass {found.newbyteorder('=').name!r}, or of an array x.astype({found.newbyteorder('=').name!r})"
        )
    try:
        return _ALIASES[found]
    except (KeyError, TypeError):
        given = found if isinstance(found, np.dtype) else dtype
        raise TypeError(f"unknown dtype {brief(dtype)}; {_hint(given)}the dtypes are {', '.join(DTYPES)}") from None


def _hint(dtype: Any) -> str:
    """Return advice on what to do instead of using an unknown dtype."""
    if isinstance(dtype, str):
        import difflib

        name = dtype.removeprefix("torch.")
        longer = [row for row in DTYPES if name and row.startswith(name)]  # of float8 there are eight
        meant = longer or difflib.get_close_matches(name, DTYPES, 1)
        return f"did you mean {', '.join(map(repr, meant))}? " if meant else ""
    if isinstance(dtype, np.dtype) and dtype.names:
        return f"of a structured array take one field, such as x[{dtype.names[0]!r}]; "
    if isinstance(dtype, np.dtype) and dtype.kind in "mM":
        return "take the integers that dates and durations are, x.view('int64'); "
    if isinstance(dtype, np.dtype) and dtype.kind == "S":
        return "take the bytes that characters are, numpy.frombuffer(x, 'uint8'); "
    return ""
