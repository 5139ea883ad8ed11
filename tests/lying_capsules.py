"""Objects that speak DLPack and nothing else: with the capsules of another object, or with capsules that
are built by hand, after DLPack's `dlpack.h`, and say whatever they are told to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CPU, CUDA, CUDA_HOST, ROCM, CUDA_MANAGED = 1, 2, 3, 10, 13
INT, FLOAT, BOOL, FLOAT4 = 0, 2, 6, 17
READ_ONLY, IS_COPIED = 1, 2

_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_LEGACY, _VERSIONED = b"dltensor", b"dltensor_versioned"  # capsules do not copy their names


class DLPackOnly:
    """Forwards the two methods of DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array.__dlpack_device__()
        return device


class DLTensor(ctypes.Structure):
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


class DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


@dataclass
class Exporter:
    """Twelve float32 elements that speak DLPack, truthfully unless told otherwise.

    Attributes
    ----------
    memory : numpy.ndarray
        The elements, as (3, 4), with guard bytes around them; its bytes are in `guarded`.
    data, shape, strides, ndim, code, bits, lanes, device_type, device_id, byte_offset, flags, version :
        What the capsule says. `data` is an address, None for that of `memory`; `ndim` None for the
        length of the shape; `version` None for a legacy capsule.
    says_device : tuple of int
        What ``__dlpack_device__`` says, None for the same as the capsule.
    """

    data: int | None = None
    shape: Sequence[int] | None = (3, 4)
    strides: Sequence[int] | None = (4, 1)
    ndim: int | None = None
    code: int = FLOAT
    bits: int = 32
    lanes: int = 1
    device_type: int = CPU
    device_id: int = 0
    byte_offset: int = 0
    flags: int = 0
    version: tuple[int, int] | None = (1, 1)
    says_device: tuple[int, int] | None = None
    guarded: np.ndarray = field(default_factory=lambda: np.full(12 * 4 + 128, 0x55, np.uint8))

    @property
    def memory(self) -> np.ndarray:
        return self.guarded[64:-64].view(np.float32).reshape(3, 4)

    def __dlpack__(self, **arguments: Any) -> Any:
        tensor = DLTensor(
            self.memory.ctypes.data if self.data is None else self.data,
            self.device_type,
            self.device_id,
            len(self.shape or ()) if self.ndim is None else self.ndim,
            self.code,
            self.bits,
            self.lanes,
            _numbers(self.shape),
            _numbers(self.strides),
            self.byte_offset,
        )
        managed: Any
        if self.version is None:
            managed, name = DLManagedTensor(tensor), _LEGACY
        else:
            managed, name = DLManagedTensorVersioned(*self.version, None, None, self.flags, tensor), _VERSIONED
        self._kept = managed  # nothing frees it but this object: there is no deleter
        return _new(ctypes.addressof(managed), name, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.says_device or (self.device_type, self.device_id)


def _numbers(values: Sequence[int] | None) -> Any:
    """Return an array in C, or null."""
    return None if values is None else (ctypes.c_int64 * max(len(values), 1))(*values)
