"""DLPack capsules: those that carriers export, corrected to name the true dtype.

The carrier's own library makes every capsule, with a deleter in C: a deleter written in Python would run
while a consumer's exception is pending, lose that error and leak the buffer. Dtypes that exporters cannot
name (bfloat16, float8) are exported as unsigned integers of the same width, and the type is corrected in
the fresh capsule. Offsets are those of ``DLManagedTensor`` and ``DLManagedTensorVersioned`` in DLPack's
``dlpack.h``, on the 64-bit systems that CUDA supports.
"""

from __future__ import annotations

import ctypes
from typing import Any

from .dtypes import DTYPES, DType

__all__ = ["CPU", "CUDA", "IS_COPIED", "READ_ONLY", "Tensor", "read_capsule", "retag"]

#: ``DLDeviceType`` of hosts and of CUDA devices.
CPU, CUDA = 1, 2
#: Bits of a versioned capsule's ``flags``.
READ_ONLY, IS_COPIED = 1, 2

_LEGACY, _VERSIONED = b"dltensor", b"dltensor_versioned"
_MINOR_VERSION, _FLAGS, _VERSIONED_TENSOR = 4, 24, 32
_DTYPE = 20  # within the DLTensor

# Not `ctypes.pythonapi.PyCapsule_GetPointer`, whose types any other code may set as well.
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))


def _word(dtype: DType, code: int) -> int:
    return code | dtype.dlpack_bits << 8 | 1 << 16  # uint8 code, uint8 bits, uint16 lanes


_UNSIGNED = DTYPES["uint8"].dlpack_code
_RETAGS = {row: (_word(row, _UNSIGNED), _word(row, row.dlpack_code)) for row in DTYPES.values() if not row.native}


class Tensor(ctypes.Structure):
    """``DLTensor``: the memory that a capsule describes."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def retag(capsule: Any, dtype: DType, max_version: tuple[int, int] | None, *, copied: bool = False) -> Any:
    """Make a fresh capsule name the true dtype of its elements.

    Parameters
    ----------
    capsule : PyCapsule
        Just exported, and not handed on yet.
    dtype : DType
        The true dtype; the capsule names `dtype` itself or its carrier.
    max_version : tuple of int, optional
        What the exporter was given; it decides which of the two kinds of capsule this is.
    copied : bool
        Whether to set the flag which says that the memory is a copy, for the consumer alone.

    Returns
    -------
    PyCapsule
        The same capsule.

    Raises
    ------
    BufferError
        If the capsule does not hold what the carrier promised.
    """
    versioned = max_version is not None and max_version[0] >= 1
    address = _get_pointer(capsule, _VERSIONED if versioned else _LEGACY)
    if dtype in _RETAGS:
        word = ctypes.c_uint32.from_address(address + (_VERSIONED_TENSOR if versioned else 0) + _DTYPE)
        carried, meant = _RETAGS[dtype]
        if word.value != carried:
            raise BufferError(f"the carrier exported type {word.value:#x}, expected {carried:#x} for {dtype.name}")
        word.value = meant
        if versioned and dtype.itemsize == 1:  # float8 came with DLPack 1.1
            minor = ctypes.c_uint32.from_address(address + _MINOR_VERSION)
            minor.value = max(minor.value, 1)
    if copied and versioned:
        ctypes.c_uint64.from_address(address + _FLAGS).value |= IS_COPIED
    return capsule


def read_capsule(capsule: Any) -> tuple[Tensor, int]:
    """Read an unconsumed capsule without consuming it.

    Parameters
    ----------
    capsule : PyCapsule
        Keep it alive as long as the memory is used: its destructor gives the memory back.

    Returns
    -------
    tensor : Tensor
        Valid while the capsule lives.
    flags : int
        `READ_ONLY` and `IS_COPIED` bits; 0 for a legacy capsule, which has no flags.

    Raises
    ------
    BufferError
        If it is not a DLPack capsule, was consumed before, or is of another major version than 1.
    """
    if _is_valid(capsule, _LEGACY):
        return Tensor.from_address(_get_pointer(capsule, _LEGACY)), 0
    if not _is_valid(capsule, _VERSIONED):
        raise BufferError(f"{capsule!r} is not an unconsumed DLPack capsule")
    address = _get_pointer(capsule, _VERSIONED)
    major = ctypes.c_uint32.from_address(address).value
    if major != 1:
        raise BufferError(f"the capsule is of DLPack {major}.x, understood is 1.x")
    flags = ctypes.c_uint64.from_address(address + _FLAGS).value
    return Tensor.from_address(address + _VERSIONED_TENSOR), flags
