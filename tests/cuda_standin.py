"""Processes whose CUDA driver is `standin/libcuda.c`: builds it, and runs the bodies of tests on it.

The devices' memory is the host's, and a kernel that is launched is run from its PTX, over what is
allocated: the whole of the Numba backend works on them as it would on a GPU, and every call is logged.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import ctypes
import functools
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import cupy_runtime
import kernel_checks
import numpy as np
import ptx
import pytest

import gpuconst

Parameters = ParamSpec("Parameters")

MIB = 1 << 20

_SOURCES = Path(__file__).parent / "standin"
_LAUNCH_FAILED = 719
_ROOM = 1 << 16
_ORIGIN = 4096  # NumPy takes a buffer at address 0 for none
_RUN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p))


def on_standin(**settings: int | str) -> Callable[[Callable[Parameters, None]], Callable[Parameters, None]]:
    """Run the body of a test in a process with stand-in devices.

    Parameters
    ----------
    **settings : int or str
        Environment variables for the process, `libcuda.c` names its own; with ``STANDIN_RUNTIME`` CuPy gets
        the stand-in's runtime too, with ``STANDIN_TORCH`` torch. Tests with the same settings share a process.
    """

    def decorate(body: Callable[Parameters, None]) -> Callable[Parameters, None]:
        @functools.wraps(body)
        def test(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> None:
            process = _process(tuple(sorted(settings.items())))
            process.submit(_call, body.__module__, body.__qualname__, arguments, keywords).result(timeout=300)

        return test

    return decorate


@functools.cache
def environment(**settings: int | str) -> dict[str, str]:
    """Return the environment of a process with stand-in devices."""
    return {
        "LD_LIBRARY_PATH": f"{_library()}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}",
        "STANDIN_LOG": str(Path(tempfile.mkdtemp(dir=_library())) / "log"),
        "XDG_CACHE_HOME": str(_library()),
        "CUPY_CACHE_DIR": str(_library() / "cupy"),
        "GPUCONST_BACKEND": "numba",
        **({"LD_PRELOAD": str(_library() / "torch_cudart.so")} if "STANDIN_TORCH" in settings else {}),
        **{name: str(value) for name, value in settings.items()},
    }


@functools.cache
def _library() -> Path:
    """Compile the stand-in and return its folder."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in driver needs Linux and a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="gpuconst-standin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    driver = folder / "libcuda.so.1"
    driver_flags = ["-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"]
    subprocess.run([compiler, *flags, "-o", driver, _SOURCES / "libcuda.c", *driver_flags], check=True)
    for runtime in ("cudart", "torch_cudart"):
        source, library = _SOURCES / f"{runtime}.c", folder / f"{runtime}.so"
        subprocess.run([compiler, *flags, "-o", library, source, driver], check=True)
    return folder


@functools.cache
def _process(settings: tuple[tuple[str, int | str], ...]) -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    process = concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_run_kernels)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(**dict(settings)).items():
            patch.setenv(name, value)  # the dynamic loader reads it as the process starts
        process.submit(int).result()
    atexit.register(process.shutdown)
    return process


# The rest runs in the process with the devices.


class Foreign:
    """Somebody's CUDA memory, known by its CUDA Array Interface: a part of a gpuconst array."""

    def __init__(self, array: gpuconst.Array, offset: int = 0, **interface: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (array.data_ptr() + offset, False),
            "typestr": array.dtype.str,
            **interface,
        }


def new_stream(device: int = 0, *, blocking: bool = False) -> int:
    """Return the handle of a new stream, one that synchronises with the legacy default stream or not."""
    handle = ctypes.c_void_p()
    with current_device(device):
        assert driver().cuStreamCreateWithPriority(ctypes.byref(handle), not blocking, 0) == 0
    assert handle.value
    return handle.value


@contextmanager
def current_device(device: int) -> Iterator[None]:
    """Make a device the thread's current one, by its primary context."""
    context = ctypes.c_void_p()
    driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    driver().cuCtxPushCurrent_v2(context)
    try:
        yield
    finally:
        driver().cuCtxPopCurrent_v2(ctypes.byref(context))


def launches() -> list[str]:
    """Return kernel and grid of each launch."""
    return [" ".join(line.split()[1:3]) for line in calls("launch")]


def calls(*names: str) -> list[str]:
    """Return the driver calls that the test has made: all, or those of some functions."""
    path = Path(os.environ["STANDIN_LOG"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.rstrip() for line in lines if not names or line.split()[0] in names]


def alive(kind: str) -> dict[int, int]:
    """Return the addresses and sizes of what is alive: 'm'emory, 's'treams, 'e'vents, 'p'ools."""
    addresses, sizes = (ctypes.c_uint64 * _ROOM)(), (ctypes.c_uint64 * _ROOM)()
    count = driver().standin_alive(ctypes.c_char(kind.encode()), addresses, sizes, _ROOM)
    return dict(zip(addresses[:count], sizes[:count], strict=True))


def current_context() -> int:
    """Return the calling thread's current context, 0 where it has none."""
    context = ctypes.c_void_p()
    driver().cuCtxGetCurrent(ctypes.byref(context))
    return context.value or 0


@functools.cache
def driver() -> Any:
    """Return the stand-in itself."""
    return ctypes.CDLL("libcuda.so.1")


def _call(module: str, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    Path(os.environ["STANDIN_LOG"]).unlink(missing_ok=True)
    getattr(importlib.import_module(module), name).__wrapped__(*arguments, **keywords)


def _run_kernels() -> None:
    driver().standin_run_with(_callback)
    if "STANDIN_RUNTIME" in os.environ:
        cupy_runtime.install(Path(os.environ["XDG_CACHE_HOME"]) / "cudart.so")


def _run(name: bytes, grid: int, block: int, parameters: Any) -> int:
    try:
        kernel = _kernels()[name.decode()]
        sizes = [size for _, size in kernel.parameters.values()]
        arguments = kernel.pack(*(ctypes.string_at(parameters[k], size) for k, size in enumerate(sizes)))
        allocated = alive("m")
        starts = [address - _ORIGIN for address in allocated]
        memory = ptx.Memory(_all_of_memory(), [*allocated], starts, [*allocated.values()])
        kernel.run(memory, [ptx.Launch(grid, block, arguments)])
    except Exception:
        traceback.print_exc()
        return _LAUNCH_FAILED
    return 0


_callback = _RUN(_run)


@functools.cache
def _kernels() -> dict[str, ptx.Kernel]:
    backend = os.environ["GPUCONST_BACKEND"] or "numba"
    stored = Path(os.environ["XDG_CACHE_HOME"]) / f"{backend}.json"  # the next process need not compile
    if not stored.exists():
        stored.write_text(json.dumps(kernel_checks.modules(backend, "sm_90")))
    return {name: ptx.Kernel(text) for name, text in json.loads(stored.read_text()).items()}


@functools.cache
def _all_of_memory() -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_ubyte * ((1 << 47) - _ORIGIN)).from_address(_ORIGIN))
