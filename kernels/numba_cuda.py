"""CUDA through Numba and cuda.core: kernels in Python, and a memory pool of its own; without CuPy."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpuconst.errors import first_line

from . import cuda_driver
from .cuda_driver import INSTALL, copy, order, synchronize
from .cuda_fill import Filler
from .cuda_lease import Lease, give_back, hand_over
from .runs import RESIDENT, RESIDENT_ELSEWHERE, THREADS, Launch

__all__ = [
    "allocate",
    "carve",
    "compile_kernels",
    "compile_ptx",
    "copy",
    "current_index",
    "fill",
    "fill_stretch",
    "full",
    "hand_over",
    "order",
    "prepare",
    "synchronize",
    "why_not",
]

#: How much freed memory the pool keeps, in bytes, when the device is synchronised: enough to make small
#: arrays cheap, too little to be missed on a shared card.
RELEASE_THRESHOLD = 256 << 20

#: What is used of cuda-core came with this release; numba-cuda accepts older ones.
OLDEST_CORE = (1, 2)

#: Packages that a cubin depends on.
_COMPILED_WITH = ("numba", "numba-cuda", "llvmlite", "cuda-core", "numpy")


def why_not(index: int) -> str | None:
    """Return why device `index` cannot be used through Numba, or None if it can."""
    absent = _missing_package() or cuda_driver.why_not(index) or _missing_compiler()
    return absent or _cannot_compile(_architecture(index))


@functools.cache
def _missing_package() -> str | None:
    for module, package in [("numba", "Numba"), ("numba_cuda", "numba-cuda"), ("cuda.core", "cuda-core")]:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{package} is not installed; {INSTALL}"
    from importlib.metadata import version

    core = version("cuda-core")
    if tuple(map(int, re.findall(r"\d+", core)[:2])) < OLDEST_CORE:
        return f"cuda-core is {core}, needed is {'.'.join(map(str, OLDEST_CORE))}; {INSTALL}"
    return None


def current_index() -> int:
    """Return the index of the calling thread's current device; without the packages, asks no driver."""
    return 0 if _missing_package() else cuda_driver.current_index()


@functools.cache
def _missing_compiler() -> str | None:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    for library in ("nvvm", "nvJitLink", "cudart"):  # Numba asks the last for its version
        try:
            load_nvidia_dynamic_lib(library)
        except Exception as error:
            return f"Numba's compiler library {library} cannot be loaded ({first_line(error)}); {INSTALL}"
    from cuda.bindings import nvjitlink

    (major, minor), supported = nvjitlink.version(), cuda_driver.driver().version
    if major > supported // 1000:
        return (
            f"Numba's compiler is of CUDA {major}.{minor}, the driver of CUDA {cuda_driver.dotted(supported)}; "
            f"pip install 'gpuconst[cuda{supported // 1000}]', or update the driver"
        )
    if getattr(sys.modules.get("numba.cuda"), "implementation", "NVIDIA") != "NVIDIA":
        return (
            "numba.cuda is Numba's built-in target, not numba-cuda: it was imported before numba-cuda could take "
            "its place; import _numba_cuda_redirector first"
        )
    return None


@functools.cache
def _cannot_compile(arch: str) -> str | None:
    # Only trying tells: incompatible releases can be installed side by side (numba-cuda 0.30 and NumPy 2.5).
    # The kernel compiled here is the one that the first fill needs, and is on disk from then on.
    try:
        _cubin("fill_run", arch)
    except Exception as error:
        from importlib.metadata import version

        used = ", ".join(f"{package} {version(package)}" for package in _COMPILED_WITH)
        return f"Numba cannot compile for {arch} ({first_line(error)}) with {used}; try other releases, or CuPy"
    return None


def allocate(nbytes: int, index: int, stream: int) -> tuple[Lease, int]:
    """Return uninitialised memory from a pool of our own, and its address."""
    give_back()
    with cuda_driver.primary_context(index):
        try:
            with cuda_driver.AnyCaptureMode():  # as a pool that grows could spoil a graph on another stream
                # A size of 0 has no address; one byte has.
                memory = _pool(index).allocate(nbytes or 1, stream=_stream(int(stream), index))
        except Exception as error:
            cuda_driver.refuse_capture(index, stream)
            if "CUDA_ERROR_OUT_OF_MEMORY" not in str(error):
                raise
            raise cuda_driver.out_of_memory(nbytes, index) from error
    return Lease(memory, index, stream, by_stream=True), int(memory.handle)


def carve(memory: Lease, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return a ``StridedMemoryView`` of part of the memory, which it keeps alive."""
    from cuda.core import Buffer
    from cuda.core.utils import StridedMemoryView

    nbytes = math.prod(shape) * dtype.itemsize
    with cuda_driver.primary_context(memory.index):
        part = Buffer.from_handle(address, nbytes or 1, owner=memory)
        return StridedMemoryView.from_buffer(part, shape, dtype=dtype)


def _start(launch: Launch, index: int, stream: int) -> None:
    # To cuda.core, an int is a signed 64-bit word; the bits of a tile can be any.
    arguments = [word if word < 1 << 63 else word - (1 << 64) for word in launch.arguments]
    kernel, start = _kernel(launch.kernel, index)
    with cuda_driver.primary_context(index):
        start(_stream(int(stream), index), _config(launch.grid), kernel, *arguments)


@functools.lru_cache(maxsize=256)
def _config(grid: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=THREADS)


_filler = Filler(allocate, _start)
full, fill, fill_stretch, prepare = _filler.full, _filler.fill, _filler.fill_stretch, _filler.prepare


@functools.lru_cache(maxsize=64)
def _stream(handle: int, index: int) -> Any:
    """Return a stream object for a handle on a device; 0 and 1 are the legacy default stream, 2 the per-thread one."""
    from cuda.core import LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM, Stream

    if handle <= 2:
        return PER_THREAD_DEFAULT_STREAM if handle == 2 else LEGACY_DEFAULT_STREAM
    return Stream.from_handle(handle)


@functools.cache
def _pool(index: int) -> Any:
    from cuda.bindings import driver
    from cuda.core import DeviceMemoryResource, DeviceMemoryResourceOptions

    with cuda_driver.AnyCaptureMode():
        pool = DeviceMemoryResource(index, DeviceMemoryResourceOptions())
    attribute = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    (status,) = driver.cuMemPoolSetAttribute(pool.handle, attribute, driver.cuuint64_t(RELEASE_THRESHOLD))
    if status:
        raise RuntimeError(f"the release threshold of the memory pool cannot be set: {status}")
    return pool


@functools.cache
def _kernel(name: str, index: int) -> tuple[Any, Callable[..., None]]:
    """Return a kernel, compiled and loaded, and the function that launches it."""
    from cuda.core import ObjectCode, launch

    with cuda_driver.primary_context(index):
        return ObjectCode.from_cubin(_cubin(name, _architecture(index)), name=name).get_kernel(name), launch


def _architecture(index: int) -> str:
    major, minor = cuda_driver.driver().devices[index].capability
    return f"sm_{major}{minor}"


@functools.cache
def _cubin(name: str, arch: str) -> bytes:
    """Return a kernel's machine code; once one process has compiled it, others read it from cuda.core's cache."""
    from cuda.core.utils import FileStreamProgramCache

    key = _key(name, arch)
    with contextlib.suppress(OSError, RuntimeError):  # there is no home directory, or no permission to read it
        stored = FileStreamProgramCache().get(key)
        if stored:
            return bytes(stored)
    cubin = _link(_compile(name, arch), arch)
    with contextlib.suppress(OSError, RuntimeError):
        FileStreamProgramCache()[key] = cubin
    return cubin


def _key(name: str, arch: str) -> str:
    """Return everything that a cubin depends on."""
    from importlib.metadata import version

    from cuda.bindings import nvjitlink

    versions = [version(package) for package in _COMPILED_WITH]
    sources = [Path(__file__).with_name(f"{module}.py").read_text() for module in ("numba_kernels", "runs")]
    return "\0".join([name, arch, *versions, str(nvjitlink.version()), *sources])


@functools.cache
def _kernels() -> tuple[Any, dict[str, tuple[Any, tuple[Any, ...]]]]:
    """Return Numba's CUDA module and the kernels to compile with it."""
    # If packages were installed with --target, the .pth file that loads this at startup was not processed,
    # and `numba.cuda` would be the target that is built into Numba.
    importlib.import_module("_numba_cuda_redirector")
    cuda = importlib.import_module("numba.cuda")

    from . import numba_kernels

    # Inlined, because Numba needs a device to compile a function that is called.
    return cuda, numba_kernels.kernels(numba_kernels.store, cuda.jit(device=True, inline="always"))


def compile_kernels(arch: str) -> dict[str, bytes]:
    """Compile the kernels; needs NVVM and nvJitLink, but no GPU and no driver.

    Parameters
    ----------
    arch : str
        Such as ``"sm_90"``.

    Returns
    -------
    dict of str to bytes
        A cubin for each kernel, by name.
    """
    return {name: _link(ptx, arch) for name, ptx in compile_ptx(arch).items()}


def compile_ptx(arch: str) -> dict[str, str]:
    """Compile the kernels to PTX, which their cubins are linked from.

    Parameters
    ----------
    arch : str
        Such as ``"sm_90"``.

    Returns
    -------
    dict of str to str
        PTX for each kernel, by name.
    """
    _, kernels = _kernels()
    return {name: _compile(name, arch) for name in kernels}


def _compile(name: str, arch: str) -> str:
    cuda, kernels = _kernels()
    function, parameters = kernels[name]
    number = arch.removeprefix("sm_")
    signature, capability = cuda.types.void(*parameters), divmod(int(number), 10)
    bounds = THREADS, RESIDENT.get(number, RESIDENT_ELSEWHERE)
    ptx, _ = cuda.compile(function, signature, device=False, abi="numba", cc=capability, launch_bounds=bounds)
    # Numba's names count what the process has compiled before; with our own names, equal kernels have equal PTX.
    mangled = re.search(r"\.entry (\w+)", ptx)
    assert mangled is not None
    return re.sub(r"\.common .*NumbaEnv.*;\n", "", ptx).replace(mangled[1], name)


def _link(ptx: str, arch: str) -> bytes:
    # To a cubin here, because an older driver would refuse the PTX of a newer compiler.
    from cuda.core import Linker, LinkerOptions, ObjectCode

    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch=arch))
    return bytes(linker.link("cubin").code)
