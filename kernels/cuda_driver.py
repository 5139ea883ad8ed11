"""The CUDA driver: which GPUs can be used, before any library is imported, and copies, events and contexts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from gpuconst.errors import DeviceUnavailableError, OutOfMemoryError

_HANDLE, _ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
#: Parameter types, where ctypes would otherwise pass 32 bits.
_PARAMETERS = {
    "cuCtxPushCurrent_v2": [_HANDLE],
    "cuMemcpyAsync": [_ADDRESS, _ADDRESS, _SIZE, _HANDLE],
    "cuStreamSynchronize": [_HANDLE],
    "cuStreamIsCapturing": [_HANDLE, _HANDLE],
    "cuStreamWaitEvent": [_HANDLE, _HANDLE, ctypes.c_uint],
    "cuEventRecord": [_HANDLE, _HANDLE],
    "cuEventQuery": [_HANDLE],
    "cuEventDestroy_v2": [_HANDLE],
}
_LEGACY, _PER_THREAD = 0, 2  # default streams; 1 is the legacy one too
_DISABLE_TIMING = 2
_OUT_OF_MEMORY = 2
_CAPTURE_RELAXED = 2
_CAPTURE_IMPLICIT = 906  # the legacy default stream, while another stream is captured

#: How to install what a backend lacks.
INSTALL = "pip install 'gpuconst[cuda12]' or 'gpuconst[cuda13]'"
#: CUDA 12, the oldest that both CuPy 14 and numba-cuda support.
OLDEST_DRIVER = 12000

_NO_DEVICE = 100
_ERRORS = {
    3: "this process was forked after CUDA was initialised in its parent, which leaves CUDA unusable; "
    "start it with the 'spawn' method",
    _NO_DEVICE: "the driver finds no device: none is attached, or the card is in MIG mode and has no instance",
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
    """What the driver reports about itself and its devices.

    Attributes
    ----------
    version : int
        CUDA version, as 1000 * major + 10 * minor; 0 if there is no driver.
    devices : tuple of Device
        In CUDA's order, as restricted by ``CUDA_VISIBLE_DEVICES``.
    why_not : str or None
        Why no device can be used, or None.
    """

    version: int
    devices: tuple[Device, ...]
    why_not: str | None


def missing() -> str | None:
    """Return why there is no driver, or None; does not call the driver."""
    try:
        _library()
    except (OSError, AttributeError) as error:  # no library, or one from before CUDA 10.1
        return f"no NVIDIA driver ({error})"
    return None


@functools.cache
def driver() -> Driver:
    """Query the driver, once per process; initialises CUDA, but makes no context."""
    absent = missing()
    if absent is not None:
        return Driver(0, (), absent)
    cuda = _library()
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


_forked = False


def forked() -> bool:
    """Whether this process was forked from one that may have used CUDA, because it had loaded the driver."""
    if not _forked:
        return False
    try:
        ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _forget() -> None:
    # A forked child cannot use what its parent initialised: let it query the driver, and be told so.
    global _forked
    _forked = True
    driver.cache_clear()
    _primary_context.cache_clear()
    _copied_from.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def why_not(index: int) -> str | None:
    """Return why GPU `index` cannot be used, or None if it can."""
    found = driver()
    if found.why_not:
        return found.why_not
    if not 0 <= index < len(found.devices):
        names = ", ".join(f"cuda:{i} ({device.name})" for i, device in enumerate(found.devices))
        return f"there is no device cuda:{index}; there are {names}"
    return None


def is_expected() -> bool:
    """Whether a GPU should be usable here, as far as can be told without calling the driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or missing() is not None:
        return False
    return driver.cache_info().currsize == 0 or driver().why_not != _explain(_NO_DEVICE)


def current_index() -> int:
    """Return the index of the calling thread's current device, or 0 if it has none yet."""
    if driver().why_not:
        return 0
    index = ctypes.c_int()
    return index.value if _library().cuCtxGetDevice(ctypes.byref(index)) == 0 else 0


@functools.cache
def _library() -> Any:
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    for name, types in _PARAMETERS.items():
        getattr(cuda, name).argtypes = types
    return cuda


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
    """Return CUDA's integer version in dotted form."""
    return f"{version // 1000}.{version % 1000 // 10}"


def device_of(address: int) -> int:
    """Return the index of the GPU whose memory contains an address.

    Raises
    ------
    DeviceUnavailableError
        If no GPU can be used.
    ValueError
        If the address is not in device memory, or is in managed memory.
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


class _Current(threading.local):
    """Where the driver writes each thread's current context."""

    def __init__(self) -> None:
        self.context = ctypes.c_void_p()
        self.pointer = ctypes.byref(self.context)


_current = _Current()
_NOTHING_TO_DO = contextlib.nullcontext()


class _PrimaryContext:
    """A device's primary context, made current by `with`; on any thread, and any number of times at once."""

    def __init__(self, index: int) -> None:
        driver()  # initialises CUDA
        cuda = _library()
        device, context = ctypes.c_int(), ctypes.c_void_p()
        _check(cuda.cuDeviceGet(ctypes.byref(device), index))
        status = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        if status == _OUT_OF_MEMORY:
            raise OutOfMemoryError(f"cuda:{index} has no room for a CUDA context; another process may hold the card")
        if status:
            raise DeviceUnavailableError(
                f"cuda:{index} gives this process no CUDA context ({_name(status)}); in exclusive mode, only one "
                "process gets it"
            )
        self._context, self._handle = context, context.value
        self._get, self._push, self._pop = cuda.cuCtxGetCurrent, cuda.cuCtxPushCurrent_v2, cuda.cuCtxPopCurrent_v2

    def is_current(self) -> bool:
        """Whether it is the calling thread's current context; takes a third of the time of `with`."""
        found = _current
        self._get(found.pointer)
        return found.context.value == self._handle

    def __enter__(self) -> None:
        _check(self._push(self._context))

    def __exit__(self, *error: object) -> None:
        self._pop(ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _primary_context(index: int) -> _PrimaryContext:
    return _PrimaryContext(index)


def primary_context(index: int) -> contextlib.AbstractContextManager[None]:
    """Return what makes a device's primary context current, which CUDA libraries share, if it is not already.

    After the `with` block, the caller's current device is what it was before. The context is kept until the
    process ends.

    Raises
    ------
    OutOfMemoryError
        If the device has no room for a context.
    DeviceUnavailableError
        If the driver refuses one, as in exclusive mode while another process has it.
    """
    context = _primary_context(index)
    return _NOTHING_TO_DO if context.is_current() else context


def copy(target: int, source: int, nbytes: int, index: int, stream: int) -> None:
    """Copy bytes between addresses of device `index` or the host, in stream order.

    Host memory must stay alive until the stream has done the copy.
    """
    if nbytes:
        with primary_context(index):
            _check(_library().cuMemcpyAsync(target, source, nbytes, stream))


#: Host arrays that a copy may still be reading, with the events that say when it is done.
_copied_from: deque[tuple[ctypes.c_void_p, np.ndarray]] = deque()


def upload(target: int, source: np.ndarray, index: int, stream: int) -> None:
    """Copy a host array to device memory in stream order; the caller need not keep the array alive."""
    cuda = _library()
    # Querying an event is forbidden while any stream is being captured, and would spoil its graph.
    with primary_context(index), AnyCaptureMode():
        _check(cuda.cuMemcpyAsync(target, source.ctypes.data, source.nbytes, stream))
        # The driver stages pageable memory before it returns, but not if the GPU can read it directly.
        _copied_from.append((_record(stream), source))
        while _copied_from:
            try:
                first = _copied_from.popleft()
            except IndexError:  # another thread was faster
                return
            if cuda.cuEventQuery(first[0]):
                _copied_from.appendleft(first)
                return
            cuda.cuEventDestroy_v2(first[0])


def order(first: int, then: int, index: int) -> None:
    """Make stream `then` wait for the work given to stream `first` so far.

    Do nothing if only one of them is being captured: a graph cannot wait for work outside it, and nothing can wait
    for a graph that has not run. The code that launches the graph orders it.

    Raises
    ------
    RuntimeError
        If one is the legacy default stream, which cannot be used while another one is captured.
    """
    if (first or 1) == (then or 1):  # 0 and 1 are the legacy default stream
        return
    cuda = _library()
    with primary_context(index):
        captured = _captured(first), _captured(then)
        if True in captured and captured != (True, True):
            return
        if None in captured:
            raise RuntimeError(
                "the legacy default stream cannot be waited for, nor wait, while a CUDA graph is captured on a stream "
                "that it synchronises with; wait until the capture has ended, or capture on a non-blocking stream"
            )
        event = _record(first)
        try:
            _check(cuda.cuStreamWaitEvent(then, event, 0))
        finally:
            cuda.cuEventDestroy_v2(event)


def on_any_thread(stream: int) -> int:
    """Return the handle to remember a stream by if another thread may use it.

    Each thread has its own per-thread default stream. The legacy one is ordered with all of them, and stands for it.
    """
    return stream if stream > _PER_THREAD else _LEGACY


def _record(stream: int) -> ctypes.c_void_p:
    cuda = _library()
    event = ctypes.c_void_p()
    _check(cuda.cuEventCreate(ctypes.byref(event), _DISABLE_TIMING))
    try:
        _check(cuda.cuEventRecord(event, stream))
    except RuntimeError:
        cuda.cuEventDestroy_v2(event)
        raise
    return event


def synchronize(index: int, stream: int) -> None:
    """Block until the stream has finished."""
    with primary_context(index), AnyCaptureMode():
        _check(_library().cuStreamSynchronize(stream))


def is_capturing(index: int, stream: int) -> bool:
    """Return whether work given to a stream becomes part of a CUDA graph, or would spoil one."""
    with primary_context(index):
        return _captured(stream) is not False


def _captured(stream: int) -> bool | None:
    """Return whether a stream is being captured; None if it is the legacy one while another is captured."""
    status = ctypes.c_int()
    error = _library().cuStreamIsCapturing(stream, ctypes.byref(status))
    if error == _CAPTURE_IMPLICIT:
        return None
    _check(error)
    return status.value != 0


class AnyCaptureMode:
    """Allow this thread what the usual capture mode forbids while a graph is captured, such as loading a kernel."""

    __slots__ = ("_mode",)

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(_CAPTURE_RELAXED)
        self._exchange()

    def __exit__(self, *error: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        _library().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))


def refuse_capture(index: int, stream: int) -> None:
    """Raise if memory cannot be allocated on a stream, because it is being captured.

    Raises
    ------
    RuntimeError
        If the stream is being captured.
    """
    if is_capturing(index, stream):
        raise RuntimeError(
            "a CUDA graph is being captured, and memory cannot be allocated meanwhile; allocate before the "
            "capture, and fill several arrays with a plan made before it: plan = gpuconst.plan_fill(...)"
        )


def out_of_memory(nbytes: int, index: int) -> OutOfMemoryError:
    """Return the error for a failed allocation of `nbytes` bytes on GPU `index`."""
    device = driver().devices[index]
    return OutOfMemoryError(
        f"cuda:{index} ({device.name}, {device.nbytes / 2**30:.1f} GiB) has no room for {nbytes} bytes "
        f"({nbytes / 2**30:.1f} GiB). Another framework may hold the card: torch keeps what it has freed until "
        "torch.cuda.empty_cache(), JAX takes most of it unless XLA_PYTHON_CLIENT_PREALLOCATE=false, TensorFlow "
        "unless TF_FORCE_GPU_ALLOW_GROWTH=true"
    )


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver reports {_name(status)}")


def _name(status: int) -> str:
    name = ctypes.c_char_p()
    _library().cuGetErrorName(status, ctypes.byref(name))
    return f"{(name.value or b'an error').decode()} ({status})"
