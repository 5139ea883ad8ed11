"""Host memory for arrays: aligned, in huge pages where the system has them, and still warm if possible.

Small requests are carved from slabs, because asking NumPy for an aligned block means asking for more
and cutting it down, which costs more than the fill. Large ones get a block of their own. Both are
anonymous private maps: their first touch, the costly part of initialising a model, is up to six times
faster in 2 MiB pages than in 4 KiB ones. (Python's `mmap` defaults to a shared map, which never gets
them.) The last two blocks are kept, and handed out again once nothing lives in them: code that makes
and drops arrays in a loop then pays for the first touch once, as it would with `malloc`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import deque
from sys import getrefcount
from typing import Any

import numpy as np

from gpuconst.errors import OutOfMemoryError

#: Every address handed out is a multiple of this. Frameworks need 64: on less, JAX copies and
#: TensorFlow aborts.
ALIGNMENT = 256
HUGE_PAGE = 2 << 20
SLAB = HUGE_PAGE
#: Requests of more bytes than this get a block of their own.
LARGEST_CARVED = SLAB // 2
#: Blocks of more bytes than this are never kept: two of them are all the memory that can lie idle.
LARGEST_KEPT = 32 << 20


class _Block:
    """A map, and how to tell that nothing lives in it: nobody else refers to the buffer."""

    __slots__ = ("address", "buffer", "idle_references", "nbytes", "offset", "used", "zeroed")

    def __init__(self, nbytes: int) -> None:
        self.buffer, self.offset, self.address, self.zeroed = _map(nbytes)
        self.nbytes = nbytes
        self.used = 0  # of a slab
        self.idle_references = getrefcount(self.buffer)


# A thread takes a block out, looks at it, and puts it back; `pop` and `append` are atomic, so there is no
# lock to be held across a fork, a signal or a finalizer. Whoever is about to hand out a block's memory
# refers to its buffer before putting it back: once it is back, idle means idle.

#: The slabs with room left: never more of them than threads that carved at once.
_open: list[_Block] = []
#: The last blocks made, and the last slabs filled.
_recent: deque[_Block] = deque(maxlen=2)


def reserve(nbytes: int) -> tuple[Any, int, int, bool]:
    """Return `nbytes` bytes of writable memory of their own.

    Parameters
    ----------
    nbytes : int
        Bytes needed.

    Returns
    -------
    buffer : object
        The owner, with the buffer protocol; whatever is built on it keeps the memory alive.
    offset : int
        Of the first byte, within the buffer.
    address : int
        Of the first byte, a multiple of `ALIGNMENT`.
    zeroed : bool
        Whether the bytes are known to be zero.

    Raises
    ------
    OutOfMemoryError
        If the system has none.
    """
    if nbytes > LARGEST_CARVED:
        block = _recycled(nbytes) or _Block(nbytes)
        buffer, zeroed, block.zeroed = block.buffer, block.zeroed, False
        if nbytes <= LARGEST_KEPT:
            _recent.append(block)
        return buffer, block.offset, block.address, zeroed
    try:
        slab = _open.pop()
    except IndexError:
        slab = _recycled(SLAB) or _Block(SLAB)
    if getrefcount(slab.buffer) == slab.idle_references:
        slab.used = 0  # start again, in memory that is still in the cache
    elif slab.used + nbytes > SLAB:
        full, slab = slab, _recycled(SLAB) or _Block(SLAB)
        _recent.append(full)
        slab.used = 0
    buffer, start = slab.buffer, slab.used
    slab.used = start + (nbytes + ALIGNMENT - 1 & -ALIGNMENT)
    _open.append(slab)
    return buffer, slab.offset + start, slab.address + start, False


def _recycled(nbytes: int) -> _Block | None:
    """Return a recent block that fits and that nothing lives in, taken out, or None."""
    for _ in range(len(_recent)):
        try:
            block = _recent.popleft()
        except IndexError:  # another thread was faster
            return None
        if nbytes <= block.nbytes <= 2 * nbytes and getrefcount(block.buffer) == block.idle_references:
            return block
        _recent.append(block)
    return None


def _map(nbytes: int) -> tuple[Any, int, int, bool]:
    """Return what `reserve` does, newly mapped."""
    huge = hasattr(mmap, "MADV_HUGEPAGE")
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        buffer: Any = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = _address(buffer)
        address = -(-start // ALIGNMENT) * ALIGNMENT
        return buffer, address - start, address, False
    # Address space is free: untouched pages of the margin never become memory.
    margin = HUGE_PAGE if huge and nbytes >= HUGE_PAGE else 0
    try:
        buffer = mmap.mmap(-1, nbytes + margin, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise OutOfMemoryError(f"the host has no {nbytes:,} bytes left: {error}") from error
    start = _address(buffer)
    offset = -start % HUGE_PAGE if margin else 0
    if margin:
        # Whole huge pages only: the rest would round the memory used up to the next 2 MiB.
        with contextlib.suppress(OSError):  # a kernel built without them: small pages serve
            buffer.madvise(mmap.MADV_HUGEPAGE, offset, nbytes // HUGE_PAGE * HUGE_PAGE)
    return buffer, offset, start + offset, True


def _address(buffer: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
