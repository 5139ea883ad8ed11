"""CUDA through CuPy: its pool, its streams, kernels in CUDA C++."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconst.errors import first_line

from . import cuda_driver
from .cuda_driver import INSTALL, copy, order, synchronize
from .cuda_fill import Filler
from .cuda_lease import Handle, Lease, give_back, hand_over
from .runs import (
    BLOCK,
    CHUNK,
    LANES,
    RESIDENT,
    RESIDENT_ELSEWHERE,
    RUN,
    THREADS,
    TILE,
    Launch,
)

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

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_MOST_PARAMETERS = 16


def why_not(index: int) -> str | None:
    """Return why device `index` cannot be used through CuPy, or None if it can."""
    return _missing_package() or cuda_driver.why_not(index) or _missing_compiler() or _too_old(index)


@functools.cache
def _missing_package() -> str | None:
    return None if importlib.util.find_spec("cupy") else f"CuPy is not installed; {INSTALL}"


def current_index() -> int:
    """Return the index of the calling thread's current device; without CuPy, asks no driver."""
    return 0 if _missing_package() else cuda_driver.current_index()


@functools.cache
def _missing_compiler() -> str | None:
    try:
        import cupy
        from cupy._core import core
    except Exception as error:
        return f"CuPy cannot be imported ({first_line(error)}); {INSTALL}"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return f"CuPy's compiler NVRTC cannot be loaded ({first_line(error)}); {INSTALL}"
    try:
        core.assemble_cupy_compiler_options(())
    except Exception as error:
        return f"CuPy's compiler NVRTC has no CUDA headers ({first_line(error)}); {INSTALL}"
    try:
        _signature()  # uses private parts of CuPy
    except Exception as error:
        return f"CuPy {cupy.__version__} makes elementwise kernels in another way ({first_line(error)}); use CuPy 14"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"CuPy cannot use CUDA ({first_line(error)}); {INSTALL}"
    return None


def _too_old(index: int) -> str | None:
    from cupy.cuda import nvrtc

    major, minor = cuda_driver.driver().devices[index].capability
    oldest = min(nvrtc.getSupportedArchs())
    if 10 * major + minor >= oldest:
        return None
    version = ".".join(map(str, nvrtc.getVersion()))
    return (
        f"CuPy's compiler NVRTC {version} has dropped compute capability {major}.{minor}, "
        f"and begins at {oldest // 10}.{oldest % 10}; pip install 'gpuconst[cuda12]' may have it still"
    )


def allocate(nbytes: int, index: int, stream: int) -> tuple[Lease, int]:
    """Return uninitialised memory of CuPy's current pool, and its address."""
    import cupy

    cuda_driver.refuse_capture(index, stream)
    give_back()
    try:
        memory, current = _take(nbytes or 1, index, stream)  # a size of 0 has no address
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise cuda_driver.out_of_memory(nbytes, index) from error
    if isinstance(memory.mem, cupy.cuda.memory.PooledMemory):  # given back on the host
        return Lease(memory, index, stream, by_stream=False), memory.ptr
    # Other allocators free in stream order, and may hold only a weak reference to the stream.
    return Lease(memory, index, Handle(stream, (stream, current)), by_stream=True), memory.ptr


def _is_out_of_memory(error: Exception) -> bool:
    """Whether CuPy's allocator, or torch's in its place, has found no room."""
    status = getattr(error, "status", None)
    return isinstance(error, MemoryError) or status == _OUT_OF_MEMORY or type(error).__name__ == "OutOfMemoryError"


def _take(nbytes: int, index: int, stream: int) -> tuple[Any, Any]:
    """Return memory, and the stream object that it was allocated on."""
    import cupy

    cuda = cupy.cuda
    current = cuda.get_current_stream()
    # A pool that grows would spoil a graph that is captured on another stream.
    with cuda_driver.AnyCaptureMode():
        if cuda.runtime.getDevice() == index and current.ptr == stream:
            return cuda.alloc(nbytes), current  # entering what is current already would take longer
        with cuda.Device(index), _stream(int(stream), index) as current:
            return cuda.alloc(nbytes), current


def carve(memory: Lease, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return a CuPy array over part of the memory, which it keeps alive."""
    import cupy

    nbytes = math.prod(shape) * dtype.itemsize
    part = cupy.cuda.UnownedMemory(address, nbytes or 1, memory, memory.index)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(part, 0))


class _Parameters:
    """A kernel's parameters as `cuLaunchKernel` takes them: words, and a pointer to each."""

    __slots__ = ("_pointers", "address", "words")

    def __init__(self) -> None:
        self.words: Any = (ctypes.c_uint64 * _MOST_PARAMETERS)()
        start = ctypes.addressof(self.words)
        self._pointers = (ctypes.c_void_p * _MOST_PARAMETERS)(*range(start, start + ctypes.sizeof(self.words), 8))
        self.address = ctypes.addressof(self._pointers)


# Kept, because making them costs as much as the launch; never more than there were launches at once.
_parameters: list[_Parameters] = []


def _start(launch: Launch, index: int, stream: int) -> None:
    arguments = launch.arguments
    if launch.kernel == "fill_run":
        threads = launch.grid * THREADS
        arguments = (*arguments, threads, threads, 0)  # of the indexer: its size, its only length, and its index
    function, start = _function(launch.kernel, index)
    try:
        parameters = _parameters.pop()
    except IndexError:
        parameters = _Parameters()
    parameters.words[: len(arguments)] = arguments
    with cuda_driver.primary_context(index):
        start(function.ptr, launch.grid, 1, 1, THREADS, 1, 1, 0, stream, parameters.address, 0)
    _parameters.append(parameters)


@functools.cache
def _function(name: str, index: int) -> tuple[Any, Callable[..., None]]:
    """Return a kernel that CuPy compiled and loaded, and CuPy's own binding of the driver's launch.

    Launched by its handle: over a driver that does nothing, that takes a quarter of the time that it takes to
    enter the device and the stream and call CuPy's elementwise kernel.
    """
    import cupy

    with cupy.cuda.Device(index):
        if name == "fill_run":
            arguments, types = _signature()
            function = _fill_run()._get_elementwise_kernel(index, arguments, types)
        else:
            function = cupy.RawKernel(_RAW[name], name).kernel
    return function, cupy.cuda.driver.launchKernel


_filler = Filler(allocate, _start)
full, fill, fill_stretch, prepare = _filler.full, _filler.fill, _filler.fill_stretch, _filler.prepare


@functools.lru_cache(maxsize=64)
def _stream(handle: int, index: int) -> Any:
    """Return a stream object for a handle on a device, which is current.

    0 and 1 are the legacy default stream, 2 is the per-thread one.
    """
    import cupy

    if handle <= 2:
        return cupy.cuda.Stream.ptds if handle == 2 else cupy.cuda.Stream.null
    return cupy.cuda.Stream.from_external(Handle(handle))


_RESIDENT = "".join(
    f"#if __CUDA_ARCH__ == {capability}0\n#define RESIDENT {ctas}\n#endif\n" for capability, ctas in RESIDENT.items()
)
_BOUNDS = f"""{_RESIDENT}
#ifndef RESIDENT
#define RESIDENT {RESIDENT_ELSEWHERE}
#endif
"""

# Integers reach a kernel as 64 bits, so no parameter has another width. Addresses are integers because a
# Region has no array. The inline assembly says what the compiler cannot know of an integer, that it points to
# global memory; otherwise, stores would take the slower generic path.
_STORES = """
typedef unsigned long long u64;

// Stores the first `width` bytes of (low, high).
__device__ __forceinline__ void store(u64 address, unsigned width, u64 low, u64 high) {
  switch (width) {
    case 16: asm volatile("st.global.v2.u64 [%0], {%1, %2};" :: "l"(address), "l"(low), "l"(high)); break;
    case 8: asm volatile("st.global.u64 [%0], %1;" :: "l"(address), "l"(low)); break;
    case 4: asm volatile("st.global.u32 [%0], %1;" :: "l"(address), "r"(static_cast<unsigned>(low))); break;
    case 2: asm volatile("st.global.u16 [%0], %1;" :: "l"(address), "h"(static_cast<unsigned short>(low))); break;
    default: asm volatile("st.global.u8 [%0], %1;" :: "l"(address), "r"(static_cast<unsigned>(low)));
  }
}

// Up to eight bytes of a tile, from the one at `offset`.
__device__ __forceinline__ u64 word(unsigned offset, u64 low, u64 high) {
  return (offset & 8 ? high : low) >> (offset & 7) * 8;
}

// The bytes before the first 16-byte boundary of a stretch and after its last, one for each of 15 threads.
__device__ __forceinline__ void store_edges(u64 address, u64 nbytes, u64 head, unsigned thread, u64 low, u64 high) {
  const unsigned tail = (nbytes - head) & 15;
  if (thread < head) store(address + thread, 1, word(address + thread, low, high), 0);
  if (thread < tail) store(address + nbytes - tail + thread, 1, word(thread, low, high), 0);
}

// A thread's units of 16 bytes in a stretch: from the one at `first` on every STEP-th of the UNITS that its CTA or
// warp fills, checked against the stretch's end only where that is near; and its byte of the edges.
template <unsigned UNITS, unsigned STEP>
__device__ __forceinline__ void fill_part(
    u64 address, u64 nbytes, u64 first, bool edges, unsigned thread, u64 low, u64 high) {
  const u64 head = min(-address & 15, nbytes);
  const u64 units = (nbytes - head) / 16;
  const u64 at = address + head + first * 16;
  if (first + (UNITS - STEP) < units) {
    for (unsigned n = 0; n < UNITS; n += STEP) store(at + n * 16, 16, low, high);
  } else {
    for (unsigned n = 0; n < UNITS; n += STEP) {
      if (first + n < units) store(at + n * 16, 16, low, high);
    }
  }
  if (edges) store_edges(address, nbytes, head, thread, low, high);
}
"""

_PREAMBLE = _BOUNDS + _STORES

_FILL_RUN = f"""
  const u64 thread = i;
  const u64 first = thread / {THREADS} * {BLOCK // TILE} + thread % {THREADS};
  fill_part<{BLOCK // TILE}, {THREADS}>(address, nbytes, first, thread < {TILE}, thread, low, high);
"""

# A warp's part of a run.
_FILL_CHUNK = f"fill_part<{CHUNK // TILE}, {LANES}>"

_FILL_ROWS = f"""
extern "C" __global__ void __launch_bounds__({THREADS}, RESIDENT) fill_rows(
    u64 address, u64 nbytes, u64 pitch, u64 chunks, u64 low, u64 high) {{
  const u64 chunk = static_cast<u64>(blockIdx.x) * {THREADS // LANES} + threadIdx.x / {LANES};
  if (chunk >= chunks) return;
  u64 stretch = chunk;
  u64 local = 0;
  if (nbytes > {CHUNK}) {{
    const u64 chunks_per_stretch = (nbytes + {CHUNK - 1}) / {CHUNK};
    stretch = chunk / chunks_per_stretch;
    local = chunk - stretch * chunks_per_stretch;
  }}
  const unsigned lane = threadIdx.x % {LANES};
  {_FILL_CHUNK}(
      address + stretch * pitch, nbytes, local * {CHUNK // TILE} + lane, local == 0, lane, low, high);
}}
"""

_FILL_RUNS = f"""
struct Run {{
  u64 {", ".join(RUN.names or ())};
}};

extern "C" __global__ void __launch_bounds__({THREADS}, RESIDENT) fill_runs(const Run* runs, u64 rows, u64 chunks) {{
  const u64* ends = reinterpret_cast<const u64*>(runs + rows);
  const u64 chunk = static_cast<u64>(blockIdx.x) * {THREADS // LANES} + threadIdx.x / {LANES};
  if (chunk >= chunks) return;
  u64 row = 0;  // the first that ends after the chunk
  for (u64 end = rows - 1; row < end;) {{
    const u64 middle = (row + end) / 2;
    if (ends[middle] > chunk) end = middle;
    else row = middle + 1;
  }}
  const Run run = runs[row];
  u64 local = row ? chunk - ends[row - 1] : chunk;
  u64 address = run.address;
  if (run.count > 1) {{
    const u64 chunks_per_stretch = (run.nbytes + {CHUNK - 1}) / {CHUNK};
    const u64 stretch = local / chunks_per_stretch;
    local -= stretch * chunks_per_stretch;
    address += stretch * run.pitch;
  }}
  const unsigned lane = threadIdx.x % {LANES};
  {_FILL_CHUNK}(
      address, run.nbytes, local * {CHUNK // TILE} + lane, local == 0, lane, run.tile_low, run.tile_high);
}}
"""

_FILL_STRIDED = f"""
extern "C" __global__ void __launch_bounds__({THREADS}, RESIDENT) NAME(
    u64 address, u64 total, u64 width, u64 shift, u64 low, u64 high,
    u64 length1, u64 length2, u64 length3, u64 stride0, u64 stride1, u64 stride2, u64 stride3) {{
  const Index thread = static_cast<Index>(blockIdx.x) * {THREADS} + threadIdx.x;
  if (thread >= total) return;
  const unsigned offset = (thread & ((1u << shift) - 1)) * width;
  Index index = thread >> shift;
  // Division is what costs here: none for dimensions that are not there.
  if (length3 > 1) {{
    const Index outer = index / static_cast<Index>(length3);
    address += (index - outer * static_cast<Index>(length3)) * stride3;
    index = outer;
  }}
  if (length2 > 1) {{
    const Index outer = index / static_cast<Index>(length2);
    address += (index - outer * static_cast<Index>(length2)) * stride2;
    index = outer;
  }}
  if (length1 > 1) {{
    const Index outer = index / static_cast<Index>(length1);
    address += (index - outer * static_cast<Index>(length1)) * stride1;
    index = outer;
  }}
  address += index * stride0 + offset;
  store(address, width, word(offset, low, high), high);
}}
"""

#: The sources of the raw kernels, by name.
_RAW = {
    "fill_rows": _PREAMBLE + _FILL_ROWS,
    "fill_runs": _PREAMBLE + _FILL_RUNS,
    "fill_strided32": _PREAMBLE + _FILL_STRIDED.replace("NAME", "fill_strided32").replace("Index", "unsigned"),
    "fill_strided64": _PREAMBLE + _FILL_STRIDED.replace("NAME", "fill_strided64").replace("Index", "u64"),
}


@functools.cache
def _fill_run() -> Any:
    """Return the elementwise kernel: each index is a thread, which stores 16 bytes four times."""
    import cupy

    parameters = "uint64 address, uint64 nbytes, uint64 low, uint64 high"
    return cupy.ElementwiseKernel(parameters, "", _FILL_RUN, "fill_run", preamble=_PREAMBLE, no_return=True)


def _signature() -> tuple[tuple[Any, ...], Any]:
    """Return the elementwise kernel's arguments and types as CuPy describes them: four integers and an indexer."""
    from cupy._core import _carray, _kernel, _scalar

    kernel = _fill_run()
    scalar = _kernel._ArgInfo(_SCALAR, _scalar.CScalar, np.dtype(np.uint64), 0, True, True)
    indexer = _kernel._ArgInfo(_INDEXER, _carray.Indexer, None, 1, True, True)
    return (*(scalar,) * kernel.nin, indexer), kernel._decide_params_type((None,) * kernel.nin, ())[2]


def sources() -> dict[str, str]:
    """Return the CUDA C++ that each kernel is compiled from; for the elementwise one, what CuPy generates.

    Returns
    -------
    dict of str to str
        By kernel name.
    """
    from cupy._core import _kernel, core

    kernel = _fill_run()
    arguments, types = _signature()
    generated = _kernel._get_elementwise_kernel_code(
        arguments, types, kernel.params, kernel.operation, kernel.name, kernel.preamble
    )
    headers = "".join(f"#include <{header}>\n" for header in core._cupy_header_list)
    return {kernel.name: headers + generated, **_RAW}


# Values of a C enum in cupy/_core/_kernel.pxd.
_INDEXER, _SCALAR = 2, 3


def compile_kernels(arch: str) -> dict[str, bytes]:
    """Compile the kernels; needs NVRTC, but no GPU and no driver.

    Parameters
    ----------
    arch : str
        Such as ``"sm_90"``.

    Returns
    -------
    dict of str to bytes
        A cubin for each kernel, by name.
    """
    # CuPy strips the last byte, as if it were the NUL at the end of PTX.
    return {name: binary + b"\0" for name, binary in _compile(f"-arch={arch}", "cubin").items()}


def compile_ptx(arch: str) -> dict[str, str]:
    """Compile the kernels to PTX, from the same sources.

    Parameters
    ----------
    arch : str
        Such as ``"sm_90"``.

    Returns
    -------
    dict of str to str
        PTX for each kernel, by name.
    """
    compiled = _compile(f"-arch={arch.replace('sm', 'compute')}", "ptx")
    return {name: ptx.decode() for name, ptx in compiled.items()}


def _compile(option: str, method: str) -> dict[str, bytes]:
    from cupy._core import core
    from cupy.cuda import compiler

    options = (*core.assemble_cupy_compiler_options(()), "-ftz=true", "--device-as-default-execution-space", option)
    return {
        name: compiler._NVRTCProgram(source, f"{name}.cu", method=method).compile(options)[0]
        for name, source in sources().items()
    }
