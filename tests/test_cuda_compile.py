"""The kernels of both GPU backends as machine code, compiled here without a GPU, and kept on disk."""

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import installed
import numpy as np
import pytest

from benchmarks.store_widths import ARCHITECTURES, Code, nvdisasm, read
from gpuconst.kernels.runs import BLOCK, CHUNK, LANES, THREADS, TILE

KERNELS = ["fill_rows", "fill_run", "fill_runs", "fill_strided32", "fill_strided64"]


REGISTERS_OF_AN_SM = 65536
THREADS_OF_AN_SM = {"sm_75": 1024, "sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}

needs_cupy, needs_numba = pytest.mark.needs("cupy"), pytest.mark.needs("numba_cuda")
backends = pytest.mark.parametrize(
    "backend", [pytest.param("cupy_cuda", marks=needs_cupy), pytest.param("numba_cuda", marks=needs_numba)]
)


@functools.cache
def compiled(backend: str, arch: str) -> dict[str, bytes]:
    cubins: dict[str, bytes] = importlib.import_module(f"gpuconst.kernels.{backend}").compile_kernels(arch)
    return cubins


@functools.cache
def disassembled(backend: str, arch: str, kernel: str) -> Code:
    return read(compiled(backend, arch)[kernel])


@pytest.fixture(scope="module")
def disassembler() -> None:
    try:
        nvdisasm()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_numba_is_not_skipped_where_it_has_to_work() -> None:
    if importlib.util.find_spec("numba_cuda") is None or np.lib.NumpyVersion(np.__version__) >= "2.5.0":
        pytest.skip("numba-cuda is not installed, or with a NumPy that it does not support")
    assert installed.why_not("numba_cuda") is None


@backends
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(backend: str, arch: str) -> None:
    cubins = compiled(backend, arch)
    assert sorted(cubins) == KERNELS
    assert all(cubin.startswith(b"\x7fELF") for cubin in cubins.values())


@backends
def test_compiling_again_gives_the_same(backend: str) -> None:
    again = importlib.import_module(f"gpuconst.kernels.{backend}").compile_kernels("sm_90")
    assert again == compiled(backend, "sm_90")


@backends
def test_ptx_is_of_the_same_kernels(backend: str) -> None:
    ptx = importlib.import_module(f"gpuconst.kernels.{backend}").compile_ptx("sm_90")
    assert sorted(ptx) == KERNELS
    for name, text in ptx.items():
        assert text.count(".entry ") == 1
        assert f".entry {name}(" in text
        assert ".target sm_90" in text


@pytest.mark.usefixtures("disassembler")
@backends
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "block"),
    [
        ("fill_run", BLOCK // TILE // THREADS),
        ("fill_rows", CHUNK // TILE // LANES),
        ("fill_runs", CHUNK // TILE // LANES),
    ],
)
def test_full_blocks_are_16_byte_stores_in_a_row(backend: str, arch: str, kernel: str, block: int) -> None:
    code = disassembled(backend, arch, kernel)
    assert code.block == block
    assert set(code.stores) == {16, 1}, "16 bytes in the body, single ones at the edges"
    assert code.stores.count(1) == 2


@pytest.mark.usefixtures("disassembler")
@backends
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["fill_strided32", "fill_strided64"])
def test_strided_kernels_have_one_store_of_each_width(backend: str, arch: str, kernel: str) -> None:
    assert sorted(disassembled(backend, arch, kernel).stores) == [1, 2, 4, 8, 16]


@pytest.mark.usefixtures("disassembler")
@backends
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_lean(backend: str, arch: str, kernel: str) -> None:
    code = disassembled(backend, arch, kernel)
    assert code.local == 0, "spilled to local memory"
    assert code.generic == 0, "stores through generic addresses"
    assert 0 < code.registers * THREADS_OF_AN_SM[arch] <= REGISTERS_OF_AN_SM, "not all of its threads fit"


@pytest.mark.usefixtures("disassembler")
@needs_cupy
def test_reading_notices_local_memory_narrow_and_generic_stores() -> None:
    from cupy.cuda import compiler

    source = """
    extern "C" __global__ void bad(unsigned* x, unsigned long long address, int n) {
      unsigned spilled[64];
      for (int i = 0; i < n; ++i) spilled[i] = x[i] * n;
      for (int i = 0; i < n; ++i) x[i] = spilled[n - i];
      *reinterpret_cast<unsigned*>(address + n * 4ull) = 1;
    }"""
    options = ("-arch=sm_90", "--device-as-default-execution-space")
    cubin, _ = compiler._NVRTCProgram(source, "bad.cu", method="cubin").compile(options)
    code = read(cubin + b"\0")
    assert code.local > 0
    assert code.generic > 0
    assert 4 in code.stores
    assert code.block == 0


CUBIN = """
    import hashlib, sys
    from gpuconst.kernels import numba_cuda
    print(hashlib.sha256(numba_cuda._cubin("fill_run", "sm_90")).hexdigest(), "numba" in sys.modules)
"""


@needs_numba
def test_numba_compiles_once_for_all_processes(run_python: Callable[..., str], tmp_path: Path) -> None:
    digest = hashlib.sha256(compiled("numba_cuda", "sm_90")["fill_run"]).hexdigest()
    assert run_python(CUBIN, XDG_CACHE_HOME=str(tmp_path)).split() == [digest, "True"]
    assert run_python(CUBIN, XDG_CACHE_HOME=str(tmp_path)).split() == [digest, "False"]


@needs_numba
def test_numba_does_without_a_cache_that_cannot_be_written(run_python: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run_python(CUBIN, XDG_CACHE_HOME=str(file)).endswith("True")


@needs_numba
def test_cache_key_depends_on_the_kernel_and_the_architecture() -> None:
    from gpuconst.kernels import numba_cuda

    assert len({numba_cuda._key(kernel, arch) for kernel in KERNELS for arch in ARCHITECTURES}) == 25
