"""The kernels of both GPU backends as machine code, compiled here without a GPU, and their cache on disk."""

import functools
import hashlib
import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.store_widths import ARCHITECTURES, Code, nvdisasm, read
from gpuconst.kernels import cubin_cache
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


@needs_numba
def test_numba_compiles_once_for_all_processes(run_python: Callable[..., str], tmp_path: Path) -> None:
    code = """
        import sys
        from gpuconst.kernels import numba_cuda, cubin_cache
        cubin = cubin_cache.load_or_make(
            numba_cuda._key("fill_run", "sm_90"),
            lambda: numba_cuda._link(numba_cuda._compile("fill_run", "sm_90"), "sm_90"),
        )
        import hashlib
        print("numba" in sys.modules, hashlib.sha256(cubin).hexdigest())
    """
    compiles, first = run_python(code, XDG_CACHE_HOME=str(tmp_path)).split()
    (file,) = (tmp_path / "gpuconst").iterdir()
    assert compiles == "True"
    assert run_python(code, XDG_CACHE_HOME=str(tmp_path)).split() == ["False", first]
    assert hashlib.sha256(compiled("numba_cuda", "sm_90")["fill_run"]).hexdigest() == first

    file.write_bytes(file.read_bytes()[:-1])
    assert run_python(code, XDG_CACHE_HOME=str(tmp_path)).split() == ["True", first]
    assert run_python(code, XDG_CACHE_HOME=str(tmp_path)).split() == ["False", first]


@needs_numba
def test_cache_key_depends_on_the_kernel_and_the_architecture() -> None:
    from gpuconst.kernels import numba_cuda

    assert len({numba_cuda._key(kernel, arch) for kernel in KERNELS for arch in ARCHITECTURES}) == 25


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gpuconst"


def _never() -> bytes:
    raise AssertionError("compiled again")


def test_cache_gives_back_what_was_made(cache: Path) -> None:
    assert cubin_cache.load_or_make("k", lambda: b"\x7fELF one") == b"\x7fELF one"
    assert cubin_cache.load_or_make("k", _never) == b"\x7fELF one"
    assert cubin_cache.load_or_make("other", lambda: b"two") == b"two"
    assert sorted(path.name for path in cache.iterdir()) == ["k.cubin", "other.cubin"]


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 100])
def test_cache_makes_a_damaged_file_anew(cache: Path, damage: bytes) -> None:
    cubin_cache.load_or_make("k", lambda: b"\x7fELF one")
    (cache / "k.cubin").write_bytes(damage)
    assert cubin_cache.load_or_make("k", lambda: b"\x7fELF two") == b"\x7fELF two"
    assert cubin_cache.load_or_make("k", _never) == b"\x7fELF two"


def test_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert cubin_cache.load_or_make("k", lambda: b"one") == b"one"
    assert cubin_cache.load_or_make("k", lambda: b"two") == b"two"


def test_cache_without_a_home_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cubin_cache.load_or_make("k", lambda: b"one") == b"one"


def test_cache_is_replaced_whole_and_leaves_no_temporary_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubin_cache.load_or_make("k", lambda: b"old" * 1000)
    path = cache / "k.cubin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # so that it is made again

    def fail(source: str, target: Path) -> None:
        assert Path(source).read_bytes()[32:] == b"new" * 1000
        assert target.read_bytes() == whole[:-1], "not written in place"
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    assert cubin_cache.load_or_make("k", lambda: b"new" * 1000) == b"new" * 1000
    assert [file.name for file in cache.iterdir()] == ["k.cubin"]


def test_cache_is_never_seen_half_written(cache: Path) -> None:
    contents = [bytes([n]) * 200_000 for n in range(8)]
    wrong = []

    def work(content: bytes) -> None:
        for _ in range(20):
            (cache / "k.cubin").unlink(missing_ok=True)
            if cubin_cache.load_or_make("k", lambda: content) not in contents:
                wrong.append(content)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
