"""One stretch of host memory, filled in the way that is fastest for its length.

Short ones are made by Python's own repetition of the element and copied into place. Long ones are stored
by the C library where it can, as 4-byte words with ``wmemset``; otherwise NumPy copies a row of bytes over
and over, with ``memcpy``. Very long ones are shared out between two threads, and the longest bypass the caches.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .host_streaming import LINE, is_touched, streaming_store
from .host_threads import share
from .runs import Region, normalised, tile

__all__ = [
    "BY_STREAMING",
    "MEMORY",
    "ORIGIN",
    "PIECE",
    "SHARED_FROM",
    "SMALLEST_SHARED",
    "UNSIGNED",
    "fill_array",
    "fill_laid_out",
    "fill_stretch",
    "laid_over",
]

#: Below this many bytes, Python takes a third of the time that it takes to make and fill a NumPy array.
BY_WORDS = 32 << 10
#: From this many bytes on, a NumPy array is filled by its address, which takes NumPy a microsecond to tell.
BY_ADDRESS = 256 << 10
#: From this many bytes on, most caches would not keep what is stored in them, and stores that bypass them take half
#: the time (rows "Fill in place", from 64 MiB).
BY_STREAMING = 48 << 20
#: Arrays of fewer bytes than this are not shared out between two threads, which would wait for the GIL.
SMALLEST_SHARED = 1 << 20
#: What each of two threads takes at a time: a huge page. A thread that gets no core, or gets one late, leaves more
#: to the other.
PIECE = 2 << 20
#: Stretches of fewer bytes than this are filled by one thread before the second is awake and has done its part; if
#: the memory is touched for the first time, which is slower, those of at most a piece.
SHARED_FROM = 8 << 20
ROW = 16 << 10

#: The dtype to move elements with, by their length.
UNSIGNED: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("V16"),
}

# All of memory as one buffer, so that NumPy arrays can be laid over any address: building a ctypes
# array type for each length instead would cost several times the fill of a small tensor. It starts
# above the null page because NumPy takes a buffer at address 0 for no buffer.
ORIGIN = 4096
MEMORY: Any = (ctypes.c_char * (sys.maxsize - ORIGIN)).from_address(ORIGIN)
_BYTES_OF_MEMORY = memoryview(MEMORY).cast("B")


def fill_stretch(
    address: int,
    nbytes: int,
    element: bytes,
    index: int = 0,
    stream: int = 0,
    *,
    untouched: bool = False,
    past_caches: bool = False,
) -> None:
    """Fill one stretch of host memory.

    Parameters
    ----------
    address : int
        Of the first byte; the caller vouches for it.
    nbytes : int
        A multiple of the element's length.
    element : bytes
        The element.
    index, stream : int, optional
        As for all backends; the CPU has only 0.
    untouched : bool, optional
        Whether the memory is known to be touched for the first time.
    past_caches : bool, optional
        Whether this is a part of a fill of `BY_STREAMING` bytes.
    """
    if nbytes < BY_WORDS:
        start = address - ORIGIN
        _BYTES_OF_MEMORY[start : start + nbytes] = element * (nbytes // len(element))
        return
    store = _stream if past_caches or nbytes >= BY_STREAMING else _store
    if nbytes <= PIECE or nbytes < SHARED_FROM and not untouched:
        store(address, nbytes, element)
    else:
        end = address + nbytes
        share([partial(store, at, min(PIECE, end - at), element) for at in range(address, end, PIECE)])


def fill_array(array: np.ndarray, element: bytes) -> None:
    """Fill a NumPy array.

    Parameters
    ----------
    array : numpy.ndarray
        Writable, of any dtype and strides.
    element : bytes
        As long as an element of the array.
    """
    if array.nbytes >= BY_ADDRESS and not array.flags.c_contiguous:
        # In another order it may be one stretch, and with strides of 0 it may be small.
        array = laid_over(Region(array.ctypes.data, array.shape, array.strides, element))
    fill_laid_out(array, element)


def fill_laid_out(array: np.ndarray, element: bytes, *, past_caches: bool = False) -> None:
    """Fill a NumPy array that is small, or already has the fewest dimensions; see `fill_array` and `fill_stretch`."""
    if array.nbytes >= BY_ADDRESS and array.flags.c_contiguous:
        fill_stretch(array.ctypes.data, array.nbytes, element, past_caches=past_caches)
    else:
        array[...] = _scalar(element, array.dtype)


def laid_over(region: Region) -> np.ndarray:
    """Return an array over the memory of a region, in the fewest dimensions.

    Parameters
    ----------
    region : Region
        Of at least one element: the address of an empty one may be null.
    """
    address, shape, strides, element = normalised(region)
    return np.ndarray(shape, UNSIGNED[len(element)], MEMORY, address - ORIGIN, strides)


def _stream(address: int, nbytes: int, element: bytes) -> None:
    """Fill a stretch past the caches, unless it is not memory yet: the system clears new pages in the cache."""
    store = streaming_store()
    head = -address % LINE
    lines, rest = divmod(nbytes - head, LINE)
    if store is None or lines < 1 or address % len(element) or not is_touched(address + nbytes - 1):
        _store(address, nbytes, element)
        return
    fill_stretch(address, head, element)
    store(address + head, *tile(address, element), lines)
    fill_stretch(address + nbytes - rest, rest, element)


def _store(address: int, nbytes: int, element: bytes) -> None:
    word, store = _word(element), _wmemset()
    if word is not None and store is not None and not address % 4:
        rest = nbytes % 4
        store(address, word, nbytes // 4)
    else:
        rows, rest = divmod(nbytes, ROW)
        np.ndarray((rows, ROW), np.uint8, MEMORY, address - ORIGIN)[...] = _row(element)
    if rest:
        fill_stretch(address + nbytes - rest, rest, element)


@functools.cache
def _wmemset() -> Callable[[int, int, int], None] | None:
    """Return the C library's fill of 4-byte words if it is known to use vector stores; else None.

    In glibc on x86-64, it fills 1 MiB in 0.8 of the time that copying rows takes. In musl and on other
    processors, it is a loop, which is slower than copying rows.
    """
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
        machine = os.uname().machine
    except (AttributeError, ValueError, OSError):
        return None
    if machine != "x86_64":
        return None
    store = ctypes.CDLL(None).wmemset
    store.argtypes, store.restype = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_size_t], None
    found: Callable[[int, int, int], None] = store
    return found


@functools.lru_cache(maxsize=64)
def _word(element: bytes) -> int | None:
    """Return the 4-byte word that repeats in memory filled with an element; None if there is no such word."""
    word = element * (4 // len(element)) if len(element) < 4 else element[:4]
    return int.from_bytes(word, sys.byteorder) if element * 4 == word * len(element) else None


@functools.lru_cache(maxsize=8)
def _row(element: bytes) -> np.ndarray:
    return np.frombuffer(element * (ROW // len(element)), np.uint8)


# Cached, because reading the bytes takes half as long as filling a small array with them.
@functools.lru_cache(maxsize=64)
def _scalar(element: bytes, dtype: np.dtype[Any]) -> np.ndarray:
    return np.frombuffer(element, dtype)
