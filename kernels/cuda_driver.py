"""Is there a GPU here that can be used? Asked of the driver itself, before any CUDA library is imported."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any, NamedTuple

from gpuconst.errors import DeviceUnavailableError

#: CUDA 12, the oldest that both CuPy 14 and numba-cuda support.
OLDEST_DRIVER = 12000

_NO_DEVICE = 100
_ERRORS = {
    3: "this process was forked after CUDA was initialised in its parent, which leaves CUDA unusable; "
    "start it with the 'spawn' method",
    _NO_DEVICE: "the driver finds no device",
    803: "the driver and the kernel module are of different versions",
    804: "the driver does not support forward compatibility on this device",
    999: "the driver cannot be initialised (is the nvidia-uvm module loaded?)",
}


class Device(NamedTuple):
    """One GPU.

    Attributes
    ----------
    name : str
        The product name.
    capability : tuple of int
        Major and minor compute capability.
    nbytes : int
        Total memory, in bytes.
    """

    name: str
    capability: tuple[int, int]
    nbytes: int


class Driver(NamedTuple):
    """What the driver says of itself and its devices.

    Attributes
    ----------
    version : int
        Of CUDA, as 1000 * major + 10 * minor; 0 where there is no driver.
    devices : tuple of Device
        In CUDA's order, as restricted by ``CUDA_VISIBLE_DEVICES``.
    why_not : str or None
        Why no device can be used, or None.
    """

    version: int
    devices: tuple[Device, ...]
    why_not: str | None


@functools.cache
def driver() -> Driver:
    """Ask the driver, once a process; initialises CUDA, makes no context."""
    try:
        cuda = _library()
    except OSError as error:
        return Driver(0, (), f"no NVIDIA driver ({error})")
    status = cuda.cuInit(0)
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if status:
        return Driver(version.value, (), _explain(status))
    if version.value < OLDEST_DRIVER:
        return Driver(
            version.value,
            (),
            f"the driver supports CUDA {dotted(version.value)}, needed is {dotted(OLDEST_DRIVER)}; update it",
        )
    count = ctypes.c_int()
    status = cuda.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return Driver(version.value, (), _explain(status or _NO_DEVICE))
    return Driver(version.value, tuple(_device(cuda, index) for index in range(count.value)), None)


if hasattr(os, "register_at_fork"):
    # A child cannot use what its parent initialised: let it ask, and be told so.
    os.register_at_fork(after_in_child=lambda: driver.cache_clear())


def why_not(index: int) -> str | None:
    """Return why GPU `index` cannot be used, or None if it can."""
    found = driver()
    if found.why_not:
        return found.why_not
    if not 0 <= index < len(found.devices):
        names = ", ".join(f"cuda:{i} ({device.name})" for i, device in enumerate(found.devices))
        return f"there is no device cuda:{index}; there are {names}"
    return None


def current_index() -> int:
    """Return the index of the calling thread's current device, 0 where it has none yet."""
    if driver().why_not:
        return 0
    index = ctypes.c_int()
    return index.value if _library().cuCtxGetDevice(ctypes.byref(index)) == 0 else 0


def _library() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _device(cuda: Any, index: int) -> Device:
    handle = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGetName(name, len(name), handle)
    total = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), handle)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, handle)  # COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle)  # COMPUTE_CAPABILITY_MINOR
    return Device(name.value.decode(), (major.value, minor.value), total.value)


def _explain(status: int) -> str:
    if status == _NO_DEVICE and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"the driver finds no device (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r})"
    return _ERRORS.get(status, f"the driver cannot be initialised (CUDA error {status})")


def dotted(version: int) -> str:
    """Return CUDA's integer version as people write it."""
    return f"{version // 1000}.{version % 1000 // 10}"


def device_of(address: int) -> int:
    """Return the index of the GPU whose memory an address is in.

    Raises
    ------
    DeviceUnavailableError
        If no GPU can be used.
    ValueError
        If the address is not device memory, or managed memory.
    """
    found = driver()
    if found.why_not:
        raise DeviceUnavailableError(f"the array says that it is in CUDA memory, but {found.why_not}")
    cuda = _library()
    kind, managed, index = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    for value, attribute in [(kind, 2), (managed, 8), (index, 9)]:  # MEMORY_TYPE, IS_MANAGED, DEVICE_ORDINAL
        if cuda.cuPointerGetAttribute(ctypes.byref(value), attribute, ctypes.c_uint64(address)):
            raise ValueError(f"the array says that it is in CUDA memory, but {address:#x} is unknown to the driver")
    if managed.value:
        raise ValueError(f"{address:#x} is CUDA managed memory; expected memory of a device")
    if kind.value != 2:  # CU_MEMORYTYPE_DEVICE
        raise ValueError(f"the array says that it is in CUDA memory, but {address:#x} is host memory")
    return index.value
