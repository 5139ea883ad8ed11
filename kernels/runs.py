"""What there is to fill, as pure integers: regions of memory, and the runs of bytes they come down to.

A constant of any dtype is 16 bytes: the bytes of an element, repeated, are a *tile*, since 1, 2, 4, 8
and 16 all divide 16. A *run* is a stretch of bytes to cover with a tile, or a row of such stretches at
a fixed pitch. Tiles are in absolute phase, the byte at address ``A`` is ``tile[A % 16]``, so a kernel
stores them at any 16-byte boundary without rotating, and one tile serves all stretches of a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

TILE = 16
#: Inner stretches shorter than this, in bytes, are cheaper element by element.
SHORTEST_STRETCH = 32

#: One run: ``count`` stretches of ``nbytes`` bytes, ``pitch`` bytes from one to the next.
RUN = np.dtype(
    [("address", "u8"), ("nbytes", "u8"), ("pitch", "u8"), ("count", "u8"), ("tile_low", "u8"), ("tile_high", "u8")]
)


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
        """Bytes that filling it writes, an address counted once for each index that leads there."""
        count = len(self.element)
        for length in self.shape:
            count *= length
        return count


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a C-ordered array."""
    strides = []
    step = itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def normalised(region: Region) -> Region:
    """Return the region of the same bytes with the fewest dimensions.

    Dimensions of length 1 and of stride 0 are dropped, negative strides flipped, dimensions sorted by
    stride, outermost first, and merged where one continues the next. An empty region stays one
    dimension of length 0.
    """
    address, shape, strides, element = region
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
    repeated = element * (2 * TILE // len(element))
    start = -address % len(element)
    phased = repeated[start : start + TILE]
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
    if len(shape) > 1 or inner < SHORTEST_STRETCH or strides[0] % itemsize or strides[0] < inner:
        return None
    return (address, inner, strides[0], shape[0], *tile(address, element))


def split(regions: Iterable[Region]) -> tuple[np.ndarray, list[Region]]:
    """Sort regions into runs and the rest.

    Returns
    -------
    runs : numpy.ndarray of RUN
        The regions that are runs.
    strided : list of Region
        The others, normalised: neither is empty of bytes.
    """
    runs: list[tuple[int, ...]] = []
    strided: list[Region] = []
    for region in regions:
        region = normalised(region)
        if 0 in region.shape:
            continue
        run = as_run(region)
        if run is not None:
            runs.append(run)
        else:
            strided.append(region)
    return np.array(runs, RUN), strided


def piece(region: Region) -> int:
    """Return the widest aligned store, in bytes, that every element of a region can be cut into."""
    bits = TILE | region.address | len(region.element)
    for stride in region.strides:
        bits |= stride
    return bits & -bits
