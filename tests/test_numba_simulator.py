"""The Numba kernels, built with a checked store and run in Numba's simulator, thread by thread."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from kernel_checks import split

from gpuconst.kernels import runs
from gpuconst.kernels.runs import BLOCK, CHUNK, THREADS, Launch, Region

pytestmark = pytest.mark.needs("numba_cuda")

ITEMSIZES = (1, 2, 4, 8, 16)
OFFSETS = range(17)
ORIGIN = 1 << 40
GUARD = 48
POISON = 0x5A


class Memory:
    """Poisoned bytes, written only in their bounds and aligned; counts the stores of each width."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.full(nbytes, POISON, "u1")
        self.widths: Counter[int] = Counter()

    def store(self, address: int, width: int, low: int, high: int) -> None:
        """Do what the intrinsic does, or refuse."""
        assert width in ITEMSIZES
        assert address % width == 0, "a GPU would fault"
        start = int(address) - ORIGIN
        assert start >= 0
        assert start + width <= len(self.bytes)
        value = (int(low) | int(high) << 64).to_bytes(16, "little")[:width]
        self.bytes[start : start + width] = np.frombuffer(value, "u1")
        self.widths[width] += 1


def simulate(memory: Memory, launches: Sequence[Launch], table: np.ndarray | None = None) -> None:
    """Run launches; a table is passed to its kernel as the array that it is."""
    from numba.cuda.simulator import kernel as simulator

    from gpuconst.kernels import numba_kernels

    make: Any = simulator.FakeCUDAKernel
    kernels = numba_kernels.kernels(memory.store, lambda function: function)
    for name, grid, arguments in launches:
        words: tuple[Any, ...] = arguments if table is None else (table, *arguments[1:])
        make(kernels[name][0], device=False)[grid, THREADS](*words)


def fill(memory: Memory, regions: Sequence[Region]) -> None:
    """Fill regions as a backend does."""
    rows, strided = split(regions)
    if len(rows) == 1:
        simulate(memory, [runs.row_launch(*rows[0].item())])
    elif len(rows):
        table = runs.table(rows)
        simulate(memory, [runs.table_launch(0, table)], table)
    for region in strided:
        simulate(memory, list(runs.strided_launches(region)))


def check(memory: Memory, regions: Sequence[Region]) -> None:
    """Compare with what NumPy makes of the regions, guard bytes and gaps included."""
    expected = np.full_like(memory.bytes, POISON)
    for address, shape, strides, element in regions:
        dtype = np.dtype((np.void, len(element)))
        view = np.ndarray(shape, dtype, expected.data, address - ORIGIN, strides)
        view[...] = np.frombuffer(element, dtype)[0]
    np.testing.assert_array_equal(memory.bytes, expected)


def element(itemsize: int) -> bytes:
    return bytes(range(0xF0, 0xF0 + itemsize))


def contiguous(address: int, nbytes: int, itemsize: int) -> Region:
    return Region(address, (nbytes // itemsize,), (itemsize,), element(itemsize))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("nbytes", [16, 48, BLOCK - 16, BLOCK, BLOCK + 16])
def test_one_run(offset: int, nbytes: int) -> None:
    for step, itemsize in enumerate(ITEMSIZES[: 5 if nbytes < 64 else 1]):
        length = nbytes + (step + offset) % 3 * itemsize - itemsize  # one element less, as many, one more
        region = contiguous(ORIGIN + GUARD + offset, length, itemsize)
        memory = Memory(length + offset + 2 * GUARD)
        fill(memory, [region])
        check(memory, [region])


def test_full_blocks_are_filled_16_bytes_at_a_time() -> None:
    region = contiguous(ORIGIN + 16, 2 * BLOCK, 1)
    memory = Memory(2 * BLOCK + 32)
    fill(memory, [region])
    check(memory, [region])
    assert memory.widths == {16: 2 * BLOCK // 16}


def test_table_of_every_itemsize_offset_and_boundary_length() -> None:
    lengths = [1, 2, 3, 15, 16, 17, 31, 32, 33, CHUNK // 16 - 1]
    regions = []
    address = ORIGIN
    for itemsize, offset, length in itertools.product(ITEMSIZES, OFFSETS, lengths):
        address += GUARD - address % 16
        regions.append(contiguous(address + offset, length * itemsize, itemsize))
        address += offset + length * itemsize
    memory = Memory(address + GUARD - ORIGIN)
    fill(memory, regions)
    check(memory, regions)


def test_table_of_long_runs_beside_tiny_ones() -> None:
    regions = []
    address = ORIGIN + GUARD
    for offset, nbytes in itertools.product((0, 1, 15), (1, CHUNK - 1, 5, CHUNK, CHUNK + 1, 3 * CHUNK + 17)):
        regions.append(contiguous(address + offset, nbytes, 1))
        address += nbytes + GUARD
    memory = Memory(address - ORIGIN)
    fill(memory, regions)
    check(memory, regions)


PITCHED = [  # itemsize, stretches, bytes in a stretch, pitch
    (1, 9, 1000, 1003),
    (2, 3, CHUNK + 2, CHUNK + 6),
    (4, 5, 132, 140),
    (8, 4, 520, 528),
    (16, 3, 2 * CHUNK, 2 * CHUNK + 16),
]


@pytest.mark.parametrize(("itemsize", "count", "nbytes", "pitch"), PITCHED)
@pytest.mark.parametrize("offset", [0, 3, 16])
def test_pitched_run(itemsize: int, count: int, nbytes: int, pitch: int, offset: int) -> None:
    region = Region(ORIGIN + GUARD + offset, (count, nbytes // itemsize), (pitch, itemsize), element(itemsize))
    rows, strided = split([region])
    assert (len(rows), strided) == (1, [])
    memory = Memory(count * pitch + offset + 2 * GUARD)
    fill(memory, [region])
    check(memory, [region])

    beside = contiguous(ORIGIN + 1, 5, 1)
    memory = Memory(count * pitch + offset + 2 * GUARD)
    fill(memory, [beside, region])
    check(memory, [beside, region])


SHAPES = [
    ((11,), (3,)),
    ((2, 300), (1000, 3)),
    ((3, 5, 7), (211, 41, 5)),
    ((2, 3, 4, 5), (311, 103, 23, 3)),
    ((2, 2, 2, 3, 2), (517, 211, 71, 17, 7)),
    ((2, 2, 1, 2, 2, 2), (977, 311, 5, 101, 23, 7)),
    ((4, 6, 2), (100, -16, 0)),
]


@pytest.mark.parametrize("kernel", ["fill_strided32", "fill_strided64"])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize(("shape", "strides"), SHAPES)
def test_strided(kernel: str, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    strides = tuple(stride * itemsize for stride in strides)
    span = sum(abs(stride) * (length - 1) for length, stride in zip(shape, strides, strict=True)) + itemsize
    below = sum(-stride * (length - 1) for length, stride in zip(shape, strides, strict=True) if stride < 0)
    offset = itemsize + 2 if itemsize == 8 else itemsize  # unaligned for one itemsize, to store in pieces
    region = Region(ORIGIN + GUARD + offset + below, shape, strides, element(itemsize))
    memory = Memory(span + 2 * GUARD + offset)
    rows, strided = split([region])
    assert len(rows) == 0
    launches = [launch for part in strided for launch in runs.strided_launches(part)]
    simulate(memory, [launch._replace(kernel=kernel) for launch in launches])
    check(memory, [region])
    assert set(memory.widths) == {runs.piece(runs.normalised(region))}


def test_strided_stores_the_widest_pieces() -> None:
    region = Region(ORIGIN + 16, (10, 8), (64, 4), element(4))
    memory = Memory(16 + 640)
    fill(memory, [region])
    check(memory, [region])
    assert memory.widths == {16: 20}


def test_the_checked_store_catches_what_a_gpu_would_not_forgive() -> None:
    memory = Memory(32)
    with pytest.raises(AssertionError, match="fault"):
        memory.store(ORIGIN + 1, 16, 0, 0)
    with pytest.raises(AssertionError):
        memory.store(ORIGIN + 32, 1, 0, 0)
    memory.store(ORIGIN + 8, 8, 1, 0)
    with pytest.raises(AssertionError):
        check(memory, [])
