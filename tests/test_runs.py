"""Runs as pure integers: whatever a region's strides, they cover the bytes that NumPy's assignment writes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_checks import split

from gpuconst.kernels import runs
from gpuconst.kernels.runs import RUN, TILE, Region

ORIGIN = 1 << 40  # of the memory below; any multiple of a tile
POISON = 0x55
ITEMSIZES = (1, 2, 4, 8, 16)


def element_of(itemsize: int) -> bytes:
    return bytes(range(0xA0, 0xA0 + itemsize))


def extent(region: Region) -> tuple[int, int]:
    """Return the lowest address of a region, and the one after its highest."""
    steps = [(length - 1) * stride for length, stride in zip(region.shape, region.strides, strict=True)]
    low = region.address + sum(step for step in steps if step < 0)
    return low, region.address + sum(step for step in steps if step > 0) + len(region.element)


def placed(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, phase: int) -> Region:
    """Return a region whose lowest address is a tile and `phase` bytes above the origin."""
    if 0 in shape:
        return Region(ORIGIN + TILE + phase, shape, strides, element_of(itemsize))
    low, _ = extent(Region(0, shape, strides, element_of(itemsize)))
    return Region(ORIGIN + TILE + phase - low, shape, strides, element_of(itemsize))


def poisoned(region: Region) -> bytearray:
    high = ORIGIN if 0 in region.shape else extent(region)[1]
    length = high - ORIGIN + 3 * TILE
    return bytearray([POISON] * length)


def assigned(region: Region) -> bytes:
    """Return the memory after NumPy's own assignment."""
    memory = poisoned(region)
    itemsize = len(region.element)
    target = np.ndarray(region.shape, f"V{itemsize}", memory, region.address - ORIGIN, region.strides)
    target[...] = np.frombuffer(region.element, f"V{itemsize}")
    return bytes(memory)


def store_element(memory: bytearray, region: Region) -> None:
    for index in itertools.product(*map(range, region.shape)):
        start = region.address - ORIGIN + sum(i * stride for i, stride in zip(index, region.strides, strict=True))
        memory[start : start + len(region.element)] = region.element


def store_run(memory: bytearray, run: np.void) -> None:
    tile = int(run["tile_low"]).to_bytes(8, "little") + int(run["tile_high"]).to_bytes(8, "little")
    for stretch in range(int(run["count"])):
        first = int(run["address"]) + stretch * int(run["pitch"])
        for address in range(first, first + int(run["nbytes"])):
            memory[address - ORIGIN] = tile[address % TILE]


def filled(region: Region) -> bytes:
    """Return the memory after what `split` says there is to do."""
    memory = poisoned(region)
    found, strided = split([region])
    for run in found:
        store_run(memory, run)
    for rest in strided:
        store_element(memory, rest)
    return bytes(memory)


def covered(memory: bytes) -> list[bool]:
    return [byte != POISON for byte in memory]


@st.composite
def any_region(draw: st.DrawFn) -> Region:
    """Any strides: negative, zero, overlapping, unaligned."""
    itemsize = draw(st.sampled_from(ITEMSIZES))
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    unit = draw(st.sampled_from([1, itemsize]))
    strides = [unit * draw(st.integers(-30, 30)) for _ in shape]
    return placed(tuple(shape), tuple(strides), itemsize, draw(st.integers(0, 2 * TILE)))


@st.composite
def padded_region(draw: st.DrawFn) -> Region:
    """Elements of which none overlaps another, with gaps, flipped and transposed: what frameworks slice."""
    itemsize = draw(st.sampled_from(ITEMSIZES))
    dims: list[tuple[int, int]] = []
    step = itemsize * draw(st.sampled_from([1, 1, 1, 3]))
    for length in draw(st.lists(st.integers(1, 5), max_size=3)) or [draw(st.integers(1, 300))]:
        if not dims:
            length *= draw(st.sampled_from([1, 16, 64]))
        dims.append((length, step))
        step = step * length + itemsize * draw(st.sampled_from([0, 0, 1, 16]))
    dims = [(length, stride * draw(st.sampled_from([1, -1]))) for length, stride in draw(st.permutations(dims))]
    return placed(tuple(n for n, _ in dims), tuple(s for _, s in dims), itemsize, draw(st.integers(0, 2 * TILE)))


@given(padded_region())
@example(placed((), (), 16, 7))
@example(placed((3, 0), (8, 8), 8, 0))
@example(placed((5, 64), (1024, 16), 16, 3))
@example(placed((64, 5), (-8, 1024), 8, 5))
def test_runs_cover_what_numpy_assigns(region: Region) -> None:
    assert filled(region) == assigned(region)


@given(any_region())
@example(placed((3, 4), (0, 0), 4, 1))
@example(placed((4,), (-4,), 4, 2))
@example(placed((4,), (1,), 8, 0))
@example(placed((1, 3, 1), (-77, 5, 1000), 2, 9))
def test_runs_cover_the_same_bytes_whatever_the_strides(region: Region) -> None:
    memory, expected = filled(region), assigned(region)
    assert covered(memory) == covered(expected)
    if all(stride % len(region.element) == 0 for stride in region.strides):  # else elements overlap in part
        assert memory == expected


@given(st.one_of(any_region(), padded_region()))
def test_normalised_is_the_shortest_form(region: Region) -> None:
    _, shape, strides, element = runs.normalised(region)
    assert element == region.element
    if 0 in region.shape:
        assert shape == (0,)
        return
    assert all(length > 1 for length in shape)
    assert all(stride > 0 for stride in strides)
    assert list(strides) == sorted(strides, reverse=True)
    inner = list(zip(shape, strides, strict=True))[1:]
    assert all(outer != n * s for outer, (n, s) in zip(strides, inner, strict=False)), "two dimensions left unmerged"


@given(st.one_of(any_region(), padded_region()))
def test_normalising_twice_changes_nothing(region: Region) -> None:
    once = runs.normalised(region)
    assert runs.normalised(once) == once


@given(st.one_of(any_region(), padded_region()))
def test_as_run_does_not_lose_or_add_bytes(region: Region) -> None:
    normal = runs.normalised(region)
    run = None if 0 in normal.shape else runs.as_run(normal)
    if run is not None:
        _, nbytes, pitch, count, _, _ = run
        assert nbytes * count == normal.nbytes
        assert pitch % len(normal.element) == 0, "one tile would not serve all stretches"
        assert count == 1 or pitch >= nbytes


@given(st.one_of(any_region(), padded_region()))
def test_widened_is_the_same_region(region: Region) -> None:
    normal = runs.normalised(region)
    if 0 in normal.shape:
        return
    wide = runs.widened(normal)
    memory, expected = poisoned(region), poisoned(region)
    store_element(memory, wide)
    store_element(expected, normal)
    assert memory == expected
    assert wide.nbytes == normal.nbytes
    width = len(wide.element)
    assert wide == normal or all(number % width == 0 for number in (wide.address, *wide.strides)), "unaligned stores"


@given(st.one_of(any_region(), padded_region()))
def test_every_element_can_be_cut_into_aligned_pieces(region: Region) -> None:
    normal = runs.normalised(region)
    width = runs.piece(normal)
    assert width in ITEMSIZES
    assert len(normal.element) % width == 0
    assert all(number % width == 0 for number in (normal.address, *normal.strides))
    wider = [normal.address, len(normal.element), *normal.strides, TILE]
    assert any(number % (2 * width) for number in wider), "a wider piece would do"


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("phase", range(2 * TILE))
def test_a_tile_is_in_absolute_phase(itemsize: int, phase: int) -> None:
    address, element = ORIGIN + phase, element_of(itemsize)
    low, high = runs.tile(address, element)
    tile = low.to_bytes(8, "little") + high.to_bytes(8, "little")
    stretch = bytes(tile[a % TILE] for a in range(address, address + 3 * TILE))
    assert stretch == element * (3 * TILE // itemsize)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_a_contiguous_array_is_one_run(itemsize: int) -> None:
    shape = (3, 1, 4, 5)
    found, strided = split([Region(ORIGIN, shape, runs.contiguous_strides(shape, itemsize), element_of(itemsize))])
    assert not strided
    assert len(found) == 1
    assert found["nbytes"] == 60 * itemsize
    assert found["count"] == 1


def test_rows_with_gaps_are_one_run() -> None:
    found, strided = split([Region(ORIGIN, (7, 128), (1024, 4), element_of(4))])
    assert not strided
    assert found["count"] == 7
    assert found["pitch"] == 1024
    assert found["nbytes"] == 512


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        pytest.param((9, 9), (64, 4), id="short stretches far apart"),
        pytest.param((3, 4, 512), (1 << 20, 1 << 14, 4), id="two outer dimensions"),
        pytest.param((3, 512), (2050, 4), id="rows at a pitch that is no multiple of the itemsize"),
        pytest.param((3, 512), (1024, 4), id="rows that overlap"),
    ],
)
def test_what_no_single_run_covers_is_left_to_strided_fills(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    found, strided = split([Region(ORIGIN, shape, strides, element_of(4))])
    assert not len(found)
    assert [region.nbytes for region in strided] == [4 * math.prod(shape)]


@pytest.mark.parametrize("shape", [(0,), (5, 0), (0, 5), (2**62, 0, 2**62)])
def test_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    found, strided = split([Region(0, shape, (8,) * len(shape), element_of(8))])
    assert found.dtype == RUN
    assert not len(found)
    assert not strided


def test_64_dimensions_of_one_element_are_one_element() -> None:
    region = Region(ORIGIN, (1,) * 64, tuple(range(-(10**9), -(10**9) + 64)), element_of(2))
    assert runs.normalised(region) == Region(ORIGIN, (), (), element_of(2))


def test_64_expanded_dimensions_are_one_element() -> None:
    region = Region(ORIGIN, (2**40,) * 64, (0,) * 64, element_of(2))
    assert runs.normalised(region) == Region(ORIGIN, (), (), element_of(2))


def test_64_dimensions_merge() -> None:
    shape = (2,) * 40 + (1,) * 24
    region = Region(ORIGIN, shape, runs.contiguous_strides(shape, 8), element_of(8))
    assert runs.normalised(region) == Region(ORIGIN, (2**40,), (8,), element_of(8))


def test_regions_keep_their_order() -> None:
    regions = [Region(ORIGIN + 64 * i, (16,), (4,), element_of(4)) for i in (3, 1, 2)]
    found, _ = split(regions)
    assert found["address"].tolist() == [region.address for region in regions]


@pytest.mark.parametrize(
    ("shape", "launches"),
    [((500, 4, 3, 5), 1), ((500, 4, 3, 5, 2), 3), ((2, 500, 4, 3, 5), 2), ((500, 4, 3, 5, 2, 6), 6)],
)
def test_more_dimensions_than_a_kernel_takes_cost_few_launches(shape: tuple[int, ...], launches: int) -> None:
    strides = runs.contiguous_strides(tuple(length + 1 for length in shape), 4)  # a gap after each dimension
    region = runs.normalised(Region(ORIGIN, shape, (*strides[:-1], 8), element_of(4)))
    assert len(region.shape) == len(shape)
    assert len(list(runs.strided_launches(region))) == launches


@given(st.lists(st.integers(0, 9), max_size=5), st.sampled_from(ITEMSIZES))
def test_contiguous_strides_are_numpys(shape: list[int], itemsize: int) -> None:
    expected = np.empty(shape, f"V{itemsize}").strides
    found = runs.contiguous_strides(tuple(shape), itemsize)
    if 0 not in shape:  # NumPy has conventions of its own for the strides of nothing
        assert found == expected
    assert len(found) == len(shape)
