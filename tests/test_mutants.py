"""Broken kernels and broken run arithmetic: each must be caught, and by the test that is named here."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import kernel_checks
import ptx
import pytest
import test_ptx
from kernel_checks import Kernels

from gpuconst.kernels import cupy_cuda, numba_cuda, runs

ARCH = "sm_90"


class Mutant(NamedTuple):
    """What is broken: `old`, in the source of a kernel or in runs.py, becomes `new`; `test` must notice."""

    broken: str
    where: str
    old: str
    new: str
    test: Callable[..., None]
    arguments: dict[str, Any] = {}


CUPY = [
    Mutant("last tail byte left out", "fill_run", "thread < tail", "thread + 1 < tail", test_ptx.test_single_runs),
    Mutant("head left out", "fill_run", "thread < head", "thread > head", test_ptx.test_single_runs),
    Mutant("head in the wrong phase", "fill_run", "word(address + thread", "word(thread", test_ptx.test_single_runs),
    Mutant("one unit too many", "fill_run", "first + n < units", "first + n <= units", test_ptx.test_single_runs),
    Mutant("full block taken too early", "fill_run", "(UNITS - STEP) < units", "(UNITS - STEP - 1) < units",
           test_ptx.test_single_runs),
    Mutant(
        "units counted in 32 bits", "fill_run", "u64 first,", "unsigned first,",
        test_ptx.test_first_and_last_block_of_a_tebibyte, {"nbytes": 1 << 40, "offset": 0},
    ),
    Mutant(
        "8 bytes at once instead of 16", "fill_run", "store(at + n * 16, 16, low, high)",
        "store(at + n * 16, 8, low, high), store(at + n * 16 + 8, 8, high, low)",
        test_ptx.test_single_runs,
    ),
    Mutant("search ends a row late", "fill_runs", "ends[middle] > chunk", "ends[middle] >= chunk",
           test_ptx.test_run_table_search, {"rows": 9}),
    Mutant("chunks before the row miscounted", "fill_runs", "chunk - ends[row - 1]", "chunk - ends[row - 1] + 1",
           test_ptx.test_run_table_of_thousands_of_tiny_rows),
    Mutant("pitch ignored", "fill_runs", "stretch * run.pitch", "stretch * run.nbytes", test_ptx.test_pitched_rows,
           {"beside": [kernel_checks.contiguous(5, -29, 1)]}),
    Mutant("edges stored by every chunk", "fill_runs", "local == 0,", "true,", test_ptx.test_run_table_of_every_length),
    Mutant("pitch ignored", "fill_rows", "stretch * pitch", "stretch * nbytes", test_ptx.test_pitched_rows,
           {"beside": []}),
    Mutant("a chunk too many in a row", "fill_rows", "(nbytes + 4095)", "(nbytes + 4096)", test_ptx.test_pitched_rows,
           {"beside": []}),
    Mutant("stretch cut to 32 bits", "fill_rows", "u64 stretch = chunk;", "unsigned char stretch = chunk;",
           test_ptx.test_last_stretch_of_a_pitched_tebibyte, {"pitch": 1 << 20, "in_a_table": False}),
    Mutant("index cut to 32 bits", "fill_strided64", "const u64 thread", "const unsigned thread",
           test_ptx.test_last_of_billions_of_strided_elements, {"itemsize": 1, "total": 2**32 + 5}),
    Mutant("offset cut to 32 bits", "fill_strided32", "index * stride0", "index * static_cast<unsigned>(stride0)",
           test_ptx.test_last_of_billions_of_strided_elements, {"itemsize": 8, "total": 2**31 - 1}),
    Mutant("a dimension mistaken for another", "fill_strided32", "* stride2;", "* stride3;", test_ptx.test_strided,
           {"index64": False}),
    Mutant("pieces of an element not told apart", "fill_strided64", "word(offset,", "word(0,", test_ptx.test_strided,
           {"index64": True}),
]  # fmt: skip

NUMBA = [
    Mutant("tail left out", "fill_run", "if thread < tail:", "if thread > tail:", test_ptx.test_single_runs),
    Mutant("blocks overlap", "fill_run", "cuda.blockIdx.x * _UNITS +", "cuda.blockIdx.x * (_UNITS - 1) +",
           test_ptx.test_single_runs),
    Mutant("search ends a row early", "fill_runs", "row = middle + 1", "row = middle + 2",
           test_ptx.test_run_table_search, {"rows": 9}),
    Mutant("edges of a row left out", "fill_rows", "LANES, local == 0,", "LANES, local == 1,",
           test_ptx.test_pitched_rows, {"beside": []}),
    Mutant("index cut to 32 bits", "fill_strided64", "strided(np.uint64)", "strided(np.uint32)",
           test_ptx.test_last_of_billions_of_strided_elements, {"itemsize": 1, "total": 2**32 + 5}),
    Mutant("compared as floating point", "fill_runs", "np.int64(table[ends + middle])", "table[ends + middle]",
           test_ptx.test_run_table_search, {"rows": 9}),
]  # fmt: skip

RUNS = [
    Mutant("tile rotated the wrong way", "tile", "-address % len(element)", "address % len(element)",
           test_ptx.test_single_runs),
    Mutant("a block too few", "run_launch", "-(-nbytes // BLOCK)", "max(1, nbytes // BLOCK)",
           test_ptx.test_single_runs),
    Mutant("chunks of rows rounded down", "row_launch", "count * -(-nbytes // CHUNK)", "-(-count * nbytes // CHUNK)",
           test_ptx.test_pitched_rows, {"beside": []}),
    Mutant("chunks rounded down", "table", "(CHUNK - 1)) // CHUNK", "1) // CHUNK",
           test_ptx.test_run_table_of_every_length),
    Mutant("pieces wider than the address is aligned", "piece", "TILE, region.address,", "TILE,",
           test_ptx.test_strided, {"index64": False}),
    Mutant("stretches out of phase taken for a run", "as_run", "strides[0] % itemsize or ", "", test_ptx.test_strided,
           {"index64": False}),
    Mutant("pieces wider than the strides are aligned", "piece", ", *region.strides", "", test_ptx.test_strided,
           {"index64": False}),
    Mutant("more than 32 bits of pieces given to 32", "strided_launches", "2**31", "2**33",
           test_ptx.test_last_of_billions_of_strided_elements, {"itemsize": 1, "total": 2**32 + 5}),
]  # fmt: skip


def named(mutant: Mutant) -> str:
    return f"{mutant.where}: {mutant.broken}"


def mutated(source: str, mutant: Mutant) -> str:
    """Return the source with every `old` replaced; there must be one."""
    assert mutant.old in source, f"{mutant.old!r} is not in the source any more: find the mutant a new place"
    return source.replace(mutant.old, mutant.new)


def check_caught(mutant: Mutant, kernels: Kernels) -> None:
    with pytest.raises((AssertionError, ptx.PTXError)):
        mutant.test(kernels, **mutant.arguments)


@pytest.mark.parametrize("mutant", CUPY, ids=named)
def test_broken_cupy_kernel_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    modules = kernel_checks.modules("cupy", ARCH)
    source = mutated(cupy_cuda.sources()[mutant.where], mutant)
    monkeypatch.setattr(cupy_cuda, "sources", lambda: {mutant.where: source})
    check_caught(mutant, Kernels({**modules, **cupy_cuda.compile_ptx(ARCH)}, elementwise=True))


@pytest.mark.needs("numba_cuda")
@pytest.mark.parametrize("mutant", NUMBA, ids=named)
def test_broken_numba_kernel_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuconst.kernels import numba_kernels

    modules = kernel_checks.modules("numba", ARCH)
    monkeypatch.setattr("gpuconst.kernels.numba_kernels", executed(numba_kernels, mutant))
    cuda, kernels = numba_cuda._kernels.__wrapped__()
    monkeypatch.setattr(numba_cuda, "_kernels", lambda: (cuda, {mutant.where: kernels[mutant.where]}))
    check_caught(mutant, Kernels({**modules, **numba_cuda.compile_ptx(ARCH)}, elementwise=False))


@pytest.mark.parametrize("mutant", RUNS, ids=named)
def test_broken_run_arithmetic_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    kernels = kernel_checks.compiled("cupy", ARCH)
    for name, function in vars(executed(runs, mutant)).items():
        if inspect.isfunction(function):
            monkeypatch.setattr(runs, name, function)
    check_caught(mutant, kernels)


def executed(module: types.ModuleType, mutant: Mutant) -> Any:
    """Return a module made of the mutated source of another."""
    broken = types.ModuleType(module.__name__)
    broken.__package__ = module.__package__
    exec(mutated(inspect.getsource(module), mutant), vars(broken))
    return broken
