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

from gpuconst.errors import OutOfMemoryError

#: Every address handed out is a multiple of this. Frameworks need 64: with less, JAX copies and
#: TensorFlow aborts.
ALIGNMENT = 256
HUGE_PAGE = 2 << 20
SLAB = HUGE_PAGE
#: Requests of more bytes than this get a block of their own.
LARGEST_CARVED = SLAB // 2
#: Blocks of more bytes than this are never kept: two of them are all the memory that can lie idle.
LARGEST_KEPT = 32 << 20


class Map(mmap.mmap):
    """Anonymous memory that knows its address.

    Attributes
    ----------
    address : int
        Of the first byte.
    """

    __slots__ = ("address",)

    address: int


class _Block:
    """Memory to hand out, and how to tell that nothing lives in it: its map has no other references."""

    __slots__ = ("address", "idle_references", "memory", "nbytes", "used")

    def __init__(self, nbytes: int, *, huge_pages: bool = True) -> None:
        self.memory, self.address = _map(nbytes, huge_pages)
        self.nbytes = nbytes
        self.used = 0  # of a slab
        # The block's own, and the argument's. A debugger or profiler may hold more now, and let go of them later.
        self.idle_references = min(2, getrefcount(self.memory))


# A thread takes a block out, looks at it, and puts it back; `pop` and `append` are atomic, so there is no
# lock that could be held across a fork, a signal or a finalizer. A thread that is about to hand out a block's
# memory takes a reference to its map before putting it back: once it is back, idle means idle.

#: The slabs with room left: never more of them than threads that carved at once.
_open: list[_Block] = []
#: The last blocks made, and the last slabs filled.
_recent: deque[_Block] = deque(maxlen=2)


def reserve(nbytes: int) -> tuple[Map, int, bool]:
    """Return writable memory: `nbytes` bytes rounded up to a multiple of `ALIGNMENT`, for the caller alone.

    Parameters
    ----------
    nbytes : int
        Bytes needed.

    Returns
    -------
    memory : Map
        The owner, with the buffer protocol; whatever is built on it keeps the memory alive.
    address : int
        Of the first byte, a multiple of `ALIGNMENT`.
    zeroed : bool
        Whether the bytes are known to be zero.

    Raises
    ------
    OutOfMemoryError
        If the system has no memory left.
    """
    if nbytes > LARGEST_CARVED:
        recycled = _recycled(nbytes)
        block = recycled or _Block(nbytes)
        memory = block.memory
        if nbytes <= LARGEST_KEPT:
            _recent.append(block)
        return memory, block.address, recycled is None
    try:
        slab = _open.pop()
    except IndexError:
        # The first one in small pages: for a few small arrays a huge page would take longer to touch than all the rest.
        slab = _recycled(SLAB) or _Block(SLAB, huge_pages=False)
    start = slab.used
    if getrefcount(slab.memory) == slab.idle_references:
        start = 0  # reuse it: it is still in the cache
    elif start + nbytes > SLAB:
        _recent.append(slab)
        slab = _recycled(SLAB) or _Block(SLAB)
        start = 0
    memory = slab.memory
    slab.used = start + (nbytes + ALIGNMENT - 1 & -ALIGNMENT)
    _open.append(slab)
    return memory, slab.address + start, False


def _recycled(nbytes: int) -> _Block | None:
    """Take out and return the last block that fits and that nothing lives in, or None."""
    for _ in range(len(_recent)):
        try:
            block = _recent.pop()  # what was used last may still be in the cache
        except IndexError:  # another thread was faster
            return None
        if nbytes <= block.nbytes <= 2 * nbytes and getrefcount(block.memory) == block.idle_references:
            return block
        _recent.appendleft(block)
    return None


def _map(nbytes: int, huge_pages: bool) -> tuple[Map, int]:
    """Return new memory, all zero, and the address in it where `nbytes` aligned bytes begin."""
    huge = huge_pages and hasattr(mmap, "MADV_HUGEPAGE")
    # Address space is free: untouched pages of the margin never become memory.
    margin = HUGE_PAGE if huge and nbytes >= HUGE_PAGE else 0
    try:
        if hasattr(mmap, "MAP_ANONYMOUS"):
            memory = Map(-1, nbytes + margin, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:  # Windows
            memory = Map(-1, nbytes)
    except (OSError, ValueError, OverflowError) as error:
        raise OutOfMemoryError(f"the host has no {nbytes:,} bytes left: {error}") from error
    memory.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = -memory.address % HUGE_PAGE if margin else 0
    if margin:
        # Whole huge pages only: with the rest, memory use would be rounded up to the next 2 MiB.
        with contextlib.suppress(OSError):  # a kernel built without them: small pages will do
            memory.madvise(mmap.MADV_HUGEPAGE, offset, nbytes // HUGE_PAGE * HUGE_PAGE)
    return memory, memory.address + offset
