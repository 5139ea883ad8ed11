"""Host memory for arrays: aligned, and in huge pages where the system has them.

Two sources. Small requests are carved from slabs, because asking NumPy for an aligned block means
asking for more and cutting it down, which costs more than the fill. Large ones get a block of their
own. Both are anonymous private maps: their first touch, the costly part of initialising a model, is
up to six times faster in 2 MiB pages than in 4 KiB ones. (Python's `mmap` defaults to a shared map,
which never gets them.)
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
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
        return _own_block(nbytes)
    try:
        slab = _open.pop()
    except IndexError:
        slab = _Slab()
    if getrefcount(slab.buffer) == slab.idle_references:
        slab.used = 0  # nothing lives in it: start again, in memory that is still in the cache
    elif slab.used + nbytes > SLAB:
        slab = _Slab()
    buffer, start = slab.buffer, slab.used  # held from here on: once it is back, idle means idle
    slab.used = start + (nbytes + ALIGNMENT - 1 & -ALIGNMENT)
    _open.append(slab)
    return buffer, slab.offset + start, slab.address + start, False


def _own_block(nbytes: int) -> tuple[Any, int, int, bool]:
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


class _Slab:
    __slots__ = ("address", "buffer", "idle_references", "offset", "used")

    def __init__(self) -> None:
        self.buffer, self.offset, self.address, _ = _own_block(SLAB)
        self.used = 0
        self.idle_references = getrefcount(self.buffer)


# The slabs with room left. A thread takes one out, carves, and puts it back; `pop` and `append` are
# atomic, so there is no lock to be held across a fork, a signal or a finalizer. There are never more
# slabs here than threads that carved at once.
_open: list[_Slab] = []
