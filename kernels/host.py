"""The backend of the CPU: memory that any consumer can take as it is, filled in the way that its length asks for.

`gpuconst.backends.Backend` describes the functions.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .host_fill import (
    BY_STREAMING,
    MEMORY,
    ORIGIN,
    PIECE,
    SMALLEST_SHARED,
    UNSIGNED,
    fill_laid_out,
    fill_stretch,
    laid_over,
)
from .host_memory import Map, reserve
from .host_threads import share
from .runs import TILE, Region

__all__ = [
    "allocate",
    "carve",
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

#: Runs of one length, up to the first of these in bytes, are scattered together if they are at least as many as the
#: second: the setup costs as much as that many fills.
LONGEST_SCATTERED, FEWEST_SCATTERED = 16 << 10, 4
#: From this many bytes on, two threads scatter: NumPy releases the GIL for only part of the time.
SCATTERED_BY_TWO = 8 << 20


def why_not(index: int) -> str | None:
    """Return why the CPU cannot be used, which is never."""
    return None


def current_index() -> int:
    """Return the index of the one CPU."""
    return 0


def allocate(nbytes: int, index: int, stream: int) -> tuple[Map, int]:
    """Return uninitialised, aligned memory, and its address."""
    memory, address, _ = reserve(nbytes)
    return memory, address


def carve(memory: Map, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return a NumPy array over part of the memory, which it keeps alive."""
    return np.ndarray(shape, dtype, memory, address - memory.address)


def full(nbytes: int, element: bytes, index: int, stream: int) -> tuple[Map, int]:
    """Return memory from `allocate`, filled with `element`, and its address."""
    memory, address, zeroed = reserve(nbytes)
    if not zeroed or any(element):
        fill_stretch(address, nbytes, element, untouched=zeroed)
    return memory, address


def fill(region: Region, index: int, stream: int) -> None:
    """Fill a region of host memory."""
    if 0 not in region.shape:
        _filler(region)()


def _filler(region: Region, *, past_caches: bool = False) -> Callable[[], None]:
    """Return a function that fills a region of at least one element; see `fill_stretch`."""
    return partial(fill_laid_out, laid_over(region), region.element, past_caches=past_caches)


def prepare(runs: np.ndarray, strided: Sequence[Region], index: int, stream: int) -> Callable[[int], None]:
    """Return a function that fills many stretches of host memory at once, as often as it is called.

    Short runs of one length are filled by one NumPy assignment through an array of addresses: 10 to 100 ns
    each, where a call for each would cost 10 times that.
    """
    scatters, alone = _scattered(runs) if len(runs) >= FEWEST_SCATTERED else ([], runs)
    regions = [*map(_as_region, alone.tolist()), *strided]

    in_turn: list[Callable[[], None]] = [scatter.store for scatter in scatters]
    large = [region for region in regions if region.nbytes >= SMALLEST_SHARED]
    past_caches = sum(region.nbytes for region in large) >= BY_STREAMING
    shared = [_filler(region, past_caches=past_caches) for region in large]
    if sum(scatter.nbytes for scatter in scatters) >= SCATTERED_BY_TWO:
        in_turn, shared = [], [*in_turn, *shared]
    in_turn += [_filler(region) for region in regions if region.nbytes < SMALLEST_SHARED]

    def run(stream: int) -> None:
        for store in in_turn:
            store()
        share(shared)

    return run


class _Scatter(NamedTuple):
    """Short runs of one length: all of memory in rows of that length, and the offsets and contents of the runs."""

    memory: np.ndarray
    offsets: np.ndarray
    elements: np.ndarray

    def store(self) -> None:
        self.memory[self.offsets] = self.elements

    @property
    def nbytes(self) -> int:
        units: int = self.memory.shape[1]
        return units * self.elements.nbytes


def _scattered(runs: np.ndarray) -> tuple[list[_Scatter], np.ndarray]:
    """Return scatters for the short runs of frequent lengths, and the other runs."""
    short = (runs["count"] == 1) & (runs["nbytes"] <= LONGEST_SCATTERED)
    scatters = []
    alone = [np.flatnonzero(~short)]
    order = np.flatnonzero(short)
    order = order[np.argsort(runs["nbytes"][order], kind="stable")]
    bounds = [0, *(np.flatnonzero(np.diff(runs["nbytes"][order])) + 1).tolist(), len(order)]
    for start, stop in itertools.pairwise(bounds):
        if stop - start < FEWEST_SCATTERED:
            alone.append(order[start:stop])
        else:
            scatters += _of_one_length(runs[order[start:stop]])
    return scatters, runs[np.concatenate(alone)]


def _of_one_length(runs: np.ndarray) -> list[_Scatter]:
    """Return scatters for runs of one length, each for up to `PIECE` bytes of them."""
    nbytes = int(runs["nbytes"][0])
    unit = math.gcd(nbytes, TILE)
    dtype = UNSIGNED[unit]
    # Overlapping rows, one at each byte: an index is an address. As many as NumPy can count the bytes of.
    memory = np.ndarray((2**62 // nbytes, nbytes // unit), dtype, MEMORY, 0, (1, unit))
    addresses = runs["address"].astype(np.int64)
    tiles = np.stack([runs["tile_low"], runs["tile_high"]], axis=1).view(np.uint8)
    if (addresses % unit).any():
        tiles = np.take_along_axis(tiles, (addresses[:, None] + np.arange(TILE)) % TILE, axis=1)
    offsets, elements = addresses - ORIGIN, np.ascontiguousarray(tiles[:, :unit]).view(dtype)
    step = PIECE // nbytes
    pieces = [slice(start, start + step) for start in range(0, len(runs), step)]
    return [_Scatter(memory, offsets[piece], elements[piece]) for piece in pieces]


def _as_region(run: tuple[int, ...]) -> Region:
    address, nbytes, pitch, count, low, high = run
    unit = math.gcd(nbytes, TILE)
    tile = (low.to_bytes(8, "little") + high.to_bytes(8, "little")) * 2
    start = address % TILE
    element = tile[start : start + unit]
    return Region(address, (count, nbytes // unit), (pitch, unit), element)


def copy(target: int, source: int, nbytes: int, index: int, stream: int) -> None:
    """Copy bytes from one address to another; the ranges do not overlap."""
    ctypes.memmove(target, source, nbytes)


def hand_over(memory: Map, first: int, then: int) -> None:
    """Do nothing: the CPU has no streams."""


def order(first: int, then: int, index: int) -> None:
    """Do nothing: the CPU has no streams."""


def synchronize(index: int, stream: int) -> None:
    """Do nothing: the CPU has finished when a call returns."""
