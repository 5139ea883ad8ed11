"""What the kernels must do, checked by running their PTX; the tests and the mutants share these checks.

Memory is poisoned with bytes below 128 and filled with bytes from 128 on, so a byte that was left out
or written by mistake cannot pass for the right one by chance.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import random
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import ptx

from gpuconst.kernels import runs
from gpuconst.kernels.runs import BLOCK, CHUNK, THREADS, TILE, Region

GUARD = 64
ITEMSIZES = (1, 2, 4, 8, 16)
#: Lengths, in bytes, around every boundary of the kernels: a tile, a warp's chunk, a CTA's block.
LENGTHS = sorted({*range(41), *(n + d for n in (CHUNK, 2 * CHUNK, BLOCK, 3 * BLOCK) for d in range(-17, 18))})

_ORIGIN = 1 << 40
_TABLES = 1 << 50  # where the run tables are
_CASES_AT_ONCE = 512
_random = np.random.default_rng(1)
_POISON = _random.integers(0, 128, 1 << 20, dtype="u1")


class Kernels:
    """The compiled kernels of a backend, launched as the backend launches them.

    Parameters
    ----------
    modules : mapping of str to str
        PTX by kernel name.
    elementwise : bool
        Whether the kernel for a single run is a CuPy elementwise kernel.
    """

    def __init__(self, modules: Mapping[str, str], *, elementwise: bool) -> None:
        self._kernels = {name: ptx.Kernel(text) for name, text in modules.items()}
        self._elementwise = elementwise

    def run(self, memory: ptx.Memory, launches: Sequence[runs.Launch], ctas: Sequence[int] | None = None) -> None:
        """Run launches, or some CTAs of `THREADS` threads of each."""
        for name, kernel in self._kernels.items():
            chosen = [launch for launch in launches if launch.kernel == name]
            kernel.run(memory, [self._launch(kernel, launch, ctas) for launch in chosen])

    def _launch(self, kernel: ptx.Kernel, launch: runs.Launch, ctas: Sequence[int] | None) -> ptx.Launch:
        arguments: tuple[int | bytes, ...] = launch.arguments
        if self._elementwise and launch.kernel == "fill_run":
            size = launch.grid * THREADS
            arguments += (struct.pack("<3q", size, size, 0),)  # CuPy's indexer: size, shape and index
        return ptx.Launch(launch.grid, THREADS, kernel.pack(*arguments), ctas)


@functools.cache
def modules(backend: str, arch: str) -> dict[str, str]:
    """Return the PTX of the kernels of a backend, for an architecture such as ``"sm_90"``."""
    compiler = importlib.import_module(f"gpuconst.kernels.{backend}_cuda")
    compiled: dict[str, str] = compiler.compile_ptx(arch)
    return compiled


def compiled(backend: str, arch: str) -> Kernels:
    """Return the kernels of a backend, compiled for an architecture."""
    return Kernels(modules(backend, arch), elementwise=backend == "cupy")


def element(itemsize: int) -> bytes:
    """Return a random element."""
    return _random.integers(128, 256, itemsize, dtype="u1").tobytes()


def poison(nbytes: int) -> np.ndarray:
    """Return random bytes that are in no element."""
    return np.resize(_POISON[_random.integers(4096) :], nbytes)


def contiguous(nbytes: int, offset: int, itemsize: int) -> Region:
    """Return a contiguous region at an offset."""
    return Region(offset, (nbytes // itemsize,), (itemsize,), element(itemsize))


def every_length() -> Iterator[Region]:
    """Return regions of every itemsize, offset and boundary length."""
    for itemsize in ITEMSIZES:
        for offset in range(17):
            for nbytes in LENGTHS:
                if nbytes % itemsize == 0:
                    yield contiguous(nbytes, offset, itemsize)


def side_by_side(regions: Iterable[Region]) -> list[Region]:
    """Return regions one after another, at least a guard apart, their offsets modulo 16 kept."""
    placed = []
    end = 0
    for region in regions:
        placed.append(region._replace(address=region.address + end))
        end += (region.address + region.nbytes + GUARD + TILE) // TILE * TILE
    return placed


def small_strided() -> Iterator[Region]:
    """Return regions of up to five dimensions whose elements do not intersect.

    Gaps between elements, rows and planes are multiples of every piece size up to the itemsize; the
    dimensions are in any order and run in either direction.
    """
    choose = random.Random(1)
    for itemsize, ndim, _ in itertools.product(ITEMSIZES, range(1, 6), range(12)):
        step = choose.choice([width for width in ITEMSIZES if width <= itemsize])
        shape: list[int] = []
        strides: list[int] = []
        extent = itemsize
        for _ in range(ndim):
            stride = extent + step * choose.choice([0, 0, 1, 1, 2, 3, 16])
            shape.append(choose.randint(1, 7 if ndim < 5 else 3))
            strides.append(choose.choice([1, -1]) * stride)
            extent += stride * (shape[-1] - 1)
        order = choose.sample(range(ndim), ndim)
        yield Region(
            step * choose.randrange(16 // step),
            tuple(shape[k] for k in order),
            tuple(strides[k] for k in order),
            element(itemsize),
        )


def check(kernels: Kernels, cases: Sequence[Sequence[Region]], *, index64: bool = False) -> Counter[int]:
    """Fill the regions of each case and compare memory byte for byte.

    Parameters
    ----------
    kernels : Kernels
        To run.
    cases : sequence of sequence of Region
        Addresses are relative to the case's own memory; regions of a case may not intersect.
    index64 : bool
        Use the strided kernel of 64-bit indices, although the regions are small.

    Returns
    -------
    Counter
        The stores made, by width in bytes.
    """
    stores: Counter[int] = Counter()
    for first in range(0, len(cases), _CASES_AT_ONCE):
        stores += _check_together(kernels, cases[first : first + _CASES_AT_ONCE], index64)
    return stores


def check_ctas(
    kernels: Kernels,
    regions: Sequence[Region],
    launch: runs.Launch,
    ctas: Sequence[int],
    windows: Sequence[tuple[int, int]],
    tables: Mapping[int, np.ndarray] | None = None,
) -> None:
    """Run some CTAs of a launch that is too large to run whole, and compare the memory that they fill.

    Parameters
    ----------
    kernels : Kernels
        To run.
    regions : sequence of Region
        What is filled, one-dimensional.
    launch : Launch
        What fills it.
    ctas : sequence of int
        Those to run.
    windows : sequence of (int, int)
        The first address and the one past the last of what they may write: outside, a store faults.
        What is in a window and in a region must be filled, the rest of the window kept.
    tables : mapping of int to numpy.ndarray, optional
        Run tables at their addresses.
    """
    before = {start: poison(stop - start) for start, stop in windows}
    memory = ptx.Memory.of({**before, **(tables or {})})
    kernels.run(memory, [launch], ctas)
    for start, stop in windows:
        expected = before[start].copy()
        for address, (length,), (stride,), value in regions:
            index, byte = np.divmod(np.arange(start - address, stop - address), stride)
            inside = (index >= 0) & (index < length) & (byte < len(value))
            expected[inside] = np.frombuffer(value, "u1")[byte[inside]]
        np.testing.assert_array_equal(memory[start], expected)


def _check_together(kernels: Kernels, cases: Sequence[Sequence[Region]], index64: bool) -> Counter[int]:
    before: dict[int, np.ndarray] = {}
    after: dict[int, np.ndarray] = {}
    launches: list[runs.Launch] = []
    nbytes = 0
    base = _ORIGIN
    for case in cases:
        low, high = _extent(case)
        start, base = base, base + (high - low + 4 * GUARD) // GUARD * GUARD
        origin = start + GUARD - low // TILE * TILE  # keeps an address and its offset equal modulo 16
        before[start] = poison(high - low + 2 * GUARD + TILE)
        after[start] = before[start].copy()
        placed = [region._replace(address=region.address + origin) for region in case]
        for region in placed:
            _fill(after[start], start, region)
            nbytes += region.nbytes
        table = _TABLES + GUARD * start
        words = _launches(placed, table, launches)
        if len(words):
            before[table] = words
            after[table] = words
    if index64:
        launches = [launch._replace(kernel=launch.kernel.replace("32", "64")) for launch in launches]
    memory, expected = ptx.Memory.of(before), ptx.Memory.of(after)
    kernels.run(memory, launches)
    if not np.array_equal(memory.data, expected.data):
        wrong = next(k for k, start in enumerate(sorted(before)) if (memory[start] != expected[start]).any())
        raise AssertionError(f"memory is wrong after {cases[wrong] if wrong < len(cases) else 'a table was written'}")
    stored = sum(width * count for width, count in memory.stores.items())
    assert stored == nbytes, f"{stored} bytes were stored into {nbytes}"
    return memory.stores


def split(regions: Iterable[Region]) -> tuple[np.ndarray, list[Region]]:
    """Sort regions into the runs of a table and the rest, normalised."""
    rows: list[tuple[int, ...]] = []
    strided: list[Region] = []
    for region in map(runs.normalised, regions):
        if 0 in region.shape:
            continue
        run = runs.as_run(region)
        if run is None:
            strided.append(region)
        else:
            rows.append(run)
    return np.array(rows, runs.RUN), strided


def _launches(regions: Sequence[Region], table: int, launches: list[runs.Launch]) -> np.ndarray:
    """Add the launches that fill some regions, and return the words of the table that they need."""
    rows, strided = split(regions)
    for region in strided:
        launches.extend(runs.strided_launches(region))
    if len(rows) == 1:
        launches.append(runs.row_launch(*rows[0].item()))
    elif len(rows):
        words: np.ndarray = runs.table(rows)
        launches.append(runs.table_launch(table, words))
        return words
    return np.empty(0, "u8")


def _extent(regions: Sequence[Region]) -> tuple[int, int]:
    """Return the lowest address of some regions and the one past the highest."""
    lows, highs = [0], [0]
    for address, shape, strides, value in regions:
        if 0 not in shape:
            spans = [stride * (length - 1) for stride, length in zip(strides, shape, strict=True)]
            lows.append(address + sum(span for span in spans if span < 0))
            highs.append(address + sum(span for span in spans if span > 0) + len(value))
    return min(lows), max(highs)


def _fill(memory: np.ndarray, base: int, region: Region) -> None:
    """Fill a region as NumPy would."""
    address, shape, strides, value = region
    if 0 not in shape:
        dtype = f"V{len(value)}"
        np.ndarray(shape, dtype, memory.data, address - base, strides)[...] = np.frombuffer(value, dtype)[0]
