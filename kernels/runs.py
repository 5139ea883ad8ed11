"""What to fill, as pure integers: regions of memory, and the runs of bytes that they come down to.

A constant of any dtype comes down to 16 bytes, a *tile*: the bytes of an element, repeated, since 1, 2, 4,
8 and 16 all divide 16. A *run* is a stretch of bytes to cover with a tile, or a row of such stretches at a
fixed pitch. Tiles are in absolute phase: the byte at address ``A`` is ``tile[A % 16]``. So a kernel stores
them at any 16-byte boundary without rotating, and one tile serves all stretches of a run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

TILE = 16

#: A CTA of a GPU kernel: 256 threads, four 16-byte stores each.
THREADS = 256
BLOCK = THREADS * 4 * TILE
#: CTAs that an SM has threads for, by compute capability, unless it has 1536 threads ("Maximum number of resident
#: threads per SM" in the CUDA C++ Programming Guide): a kernel must use few enough registers for all to be resident.
RESIDENT = {"75": 4, "80": 8, "90": 8, "100": 8, "103": 8}
RESIDENT_ELSEWHERE = 6
#: The part of a run that a warp fills: eight 16-byte stores per lane.
LANES = 32
CHUNK = LANES * 8 * TILE
#: How many lengths a strided kernel takes as parameters, that of the outermost dimension not counted.
INNER_LENGTHS = 3

#: One run: ``count`` stretches of ``nbytes`` bytes, ``pitch`` bytes from one to the next.
RUN = np.dtype(
    [("address", "u8"), ("nbytes", "u8"), ("pitch", "u8"), ("count", "u8"), ("tile_low", "u8"), ("tile_high", "u8")]
)

_TABLE_WORDS = RUN.itemsize // 8 + 1


class Region(NamedTuple):
    """Memory to fill with one element over and over.

    Attributes
    ----------
    address : int
        Of the element at index (0, 0, …).
    shape : tuple of int
        Elements along each dimension.
    strides : tuple of int
        Bytes from one element to the next along each dimension; any sign, 0 and overlap allowed.
    element : bytes
        The element; its length is the itemsize.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: bytes

    @property
    def nbytes(self) -> int:
        """Bytes that filling it writes; an address counts once for each index that leads to it."""
        return len(self.element) * math.prod(self.shape)


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a C-ordered array."""
    if len(shape) == 1:  # as most are: in a sixth of the time
        return (itemsize,)
    strides = []
    step = itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def normalised(region: Region) -> Region:
    """Return the region of the same bytes with the fewest dimensions.

    Dimensions of length 1 or stride 0 are dropped, negative strides are flipped, and dimensions are
    sorted by stride, outermost first, and merged where one continues the next. An empty region becomes
    one dimension of length 0.
    """
    address, shape, strides, element = region
    if len(shape) == 1 and strides[0] == len(element) and shape[0] > 1:
        return region
    if 0 in shape:
        return Region(address, (0,), (len(element),), element)
    dims: list[tuple[int, int]] = []
    for stride, length in sorted((abs(s), n) for n, s in zip(shape, strides, strict=True) if n > 1 and s):
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0], dims[-1][1] * length)
        else:
            dims.append((stride, length))
    address += sum(s * (n - 1) for n, s in zip(shape, strides, strict=True) if s < 0)
    dims.reverse()
    return Region(address, tuple(n for _, n in dims), tuple(s for s, _ in dims), element)


def tile(address: int, element: bytes) -> tuple[int, int]:
    """Return the tile of `element` for memory in which an element starts at `address`.

    Returns
    -------
    low, high : int
        Its first and last eight bytes as little-endian integers.
    """
    return _phased(element, -address % len(element))


@functools.lru_cache(maxsize=256)
def _phased(element: bytes, start: int) -> tuple[int, int]:
    """Return the tile that begins with the byte at `start` of an element."""
    phased = (element * (2 * TILE // len(element)))[start : start + TILE]
    return int.from_bytes(phased[:8], "little"), int.from_bytes(phased[8:], "little")


def as_run(region: Region) -> tuple[int, ...] | None:
    """Return the fields of the run that covers a normalised region, or None where no single run does."""
    address, shape, strides, element = region
    itemsize = len(element)
    inner = itemsize
    if shape and strides[-1] == itemsize:
        inner *= shape[-1]
        shape, strides = shape[:-1], strides[:-1]
    if not shape:
        return (address, inner, 0, 1, *tile(address, element))
    if len(shape) > 1 or strides[0] % itemsize or strides[0] < inner:
        return None
    if inner < LANES * math.gcd(TILE, address, inner, strides[0]):
        return None  # a warp would store less than one piece per lane: cheaper piece by piece
    return (address, inner, strides[0], shape[0], *tile(address, element))


def piece(region: Region) -> int:
    """Return the widest aligned store, in bytes, that every element of a region can be cut into."""
    return math.gcd(TILE, region.address, len(region.element), *region.strides)


def widened(region: Region) -> Region:
    """Return the region of the same bytes with the widest elements that its inner stretches can be cut into."""
    address, shape, strides, element = region
    itemsize = len(element)
    if not shape or strides[-1] != itemsize:
        return region
    width = math.gcd(TILE, address, shape[-1] * itemsize, *strides[:-1])
    if width <= itemsize:
        return region
    repeats = width // itemsize
    return Region(address, (*shape[:-1], shape[-1] // repeats), (*strides[:-1], width), element * repeats)


class Launch(NamedTuple):
    """One launch of a GPU kernel, with `THREADS` threads per CTA.

    Attributes
    ----------
    kernel : str
        ``"fill_run"``, ``"fill_rows"``, ``"fill_runs"``, ``"fill_strided32"`` or ``"fill_strided64"``.
    grid : int
        Number of CTAs.
    arguments : tuple of int
        The kernel's parameters, each of 64 bits.
    """

    kernel: str
    grid: int
    arguments: tuple[int, ...]


def run_launch(address: int, nbytes: int, tile_low: int, tile_high: int) -> Launch:
    """Return the launch that fills one stretch of at least one byte."""
    return Launch("fill_run", -(-nbytes // BLOCK), (address, nbytes, tile_low, tile_high))


def row_launch(address: int, nbytes: int, pitch: int, count: int, tile_low: int, tile_high: int) -> Launch:
    """Return the launch that fills one run of at least one byte, given its fields as in `RUN`."""
    if count == 1:
        return run_launch(address, nbytes, tile_low, tile_high)
    chunks = count * -(-nbytes // CHUNK)
    return Launch("fill_rows", -(-chunks * LANES // THREADS), (address, nbytes, pitch, chunks, tile_low, tile_high))


def region_launches(region: Region) -> Iterable[Launch]:
    """Return the launches that fill any one region; they need no table."""
    region = normalised(region)
    if 0 in region.shape:
        return []
    run = as_run(region)
    return [row_launch(*run)] if run is not None else strided_launches(region)


def table(runs: np.ndarray) -> np.ndarray:
    """Return what the kernel for many runs reads, as 64-bit words.

    Parameters
    ----------
    runs : numpy.ndarray of RUN
        At least one, each of at least one byte.

    Returns
    -------
    numpy.ndarray of uint64
        The runs' fields, row by row; then for each run the number of chunks up to its end.
    """
    chunks = runs["count"] * ((runs["nbytes"] + (CHUNK - 1)) // CHUNK)
    return np.concatenate((runs.view(np.uint64), np.cumsum(chunks)))


def table_launch(address: int, words: np.ndarray) -> Launch:
    """Return the launch that fills the runs of a table, which is in device memory at `address`."""
    chunks = int(words[-1])
    return Launch("fill_runs", -(-chunks * LANES // THREADS), (address, len(words) // _TABLE_WORDS, chunks))


def strided_launches(region: Region) -> Iterator[Launch]:
    """Return the launches that fill a normalised region of at least one element.

    One, unless the region has more dimensions than the kernel takes: then one for each step along the shortest
    of them, the innermost left out. Its arguments are the address of the first element, the number of pieces to
    store, the bytes in a piece, the binary logarithm of the pieces in an element, the element as two words, the
    lengths of all dimensions but the outermost and the strides of all.
    """
    address, shape, strides, element = widened(region)
    if len(shape) > INNER_LENGTHS + 1:
        axis = shape.index(min(shape[:-1]))
        shape, steps = (*shape[:axis], *shape[axis + 1 :]), range(0, shape[axis] * strides[axis], strides[axis])
        strides = (*strides[:axis], *strides[axis + 1 :])
        for step in steps:
            yield from strided_launches(Region(address + step, shape, strides, element))
        return
    width = piece(Region(address, shape, strides, element))
    pieces = len(element) // width
    total = pieces * math.prod(shape)
    padding = INNER_LENGTHS + 1 - len(shape)
    yield Launch(
        "fill_strided32" if total < 2**31 else "fill_strided64",
        -(-total // THREADS),
        (
            address,
            total,
            width,
            pieces.bit_length() - 1,
            *tile(0, element),
            *shape[1:],
            *(1,) * padding,
            *strides,
            *(0,) * padding,
        ),
    )
