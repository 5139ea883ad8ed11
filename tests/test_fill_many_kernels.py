"""What a GPU does of `gpuconst.fill_many`: its launches, run from the kernels' PTX on memory of the host."""

from typing import Any

import numpy as np
import ptx
import pytest
import torch
from hypothesis import given
from installed import require
from kernel_checks import Kernels, compiled
from many import Entry, cases, filled, noise

from gpuconst.batch import gather
from gpuconst.dtypes import DTYPES
from gpuconst.kernels import runs


@pytest.fixture(params=["cupy", "numba"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    require({"cupy": "cupy", "numba": "numba_cuda"}[request.param])
    return compiled(request.param, "sm_90")


def launched(arrays: list[Any], values: list[Any], memory: np.ndarray, kernels: Kernels) -> np.ndarray:
    """Return what the kernels make of some memory."""
    table_address = 1 << 50
    start = memory.ctypes.data
    for batch in gather(arrays, b"", values):
        launches = [launch for region in batch.strided for launch in runs.strided_launches(region)]
        segments = {start: memory}
        if len(batch.runs):
            segments[table_address] = words = runs.table(batch.runs)
            launches.append(runs.table_launch(table_address, words))
        device = ptx.Memory.of(segments)
        kernels.run(device, launches)
        memory[:] = device[start]
    return memory


@pytest.mark.parametrize("longest", [3, 40, 3000])
def test_thousands_of_rows_on_the_kernels(kernels: Kernels, longest: int) -> None:
    random = np.random.default_rng(longest)
    dtypes = [name for name in DTYPES if hasattr(torch, name)]
    entries = []
    end = 64
    for k in range(3000):
        dtype = dtypes[k % len(dtypes)]
        itemsize = DTYPES[dtype].itemsize
        length = int(random.integers(1, longest))
        entries.append(Entry("torch", dtype, (length,), (itemsize,), end, random.bytes(itemsize)))
        end += length * itemsize + int(random.integers(0, 20))
    memory = noise(end + 64)
    found = launched([e.over(memory) for e in entries], [e.value for e in entries], memory, kernels)
    assert np.array_equal(found, filled(len(memory), entries))


def test_any_arrays_on_the_kernels(kernels: Kernels) -> None:
    @given(cases())
    def check(case: tuple[int, list[Entry]]) -> None:
        size, entries = case
        memory = noise(size)
        found = launched([e.over(memory) for e in entries], [e.value for e in entries], memory, kernels)
        np.testing.assert_array_equal(found, filled(size, entries))

    check()
