"""The CPU: NumPy's own assignment, over memory that the next consumer can take as it is."""

from __future__ import annotations

import _thread
import ctypes
import functools
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .host_memory import reserve
from .runs import TILE, Region, normalised

#: From `BY_ROWS` bytes on, rows of `ROW` bytes are copied instead of elements stored: NumPy copies a row
#: with memcpy, at twice the speed of its fill. Below, the calls that set it up cost more.
ROW = 16 << 10
BY_ROWS = 64 << 10
#: From this many bytes on, two threads fill: memory that has been touched before, and memory that has not,
#: whose first touch is bound by the page faults of one core.
TWO_THREADS, TWO_THREADS_TOUCH = 8 << 20, 4 << 20
#: Arrays of fewer bytes than this are not shared out between two threads: they would wait for the interpreter.
SMALLEST_SHARED = 1 << 20
#: What a thread takes of an array at a time, a huge page: one that gets no core, or late, leaves more to the other.
PIECE = 2 << 20
#: Runs of one length are scattered together from this many on; setting it up costs as much as so many fills.
FEWEST_SCATTERED = 4

# All of memory as one buffer, so that NumPy arrays can be laid over any address: building a ctypes
# array type for each length instead would cost several times the fill of a small tensor. It starts
# above the null page because NumPy takes a buffer at address 0 for none.
_ORIGIN = 4096
_MEMORY: Any = (ctypes.c_char * (sys.maxsize - _ORIGIN)).from_address(_ORIGIN)

_UNSIGNED: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("V16"),
}
_BYTES = np.dtype("u1")


def why_not(index: int) -> str | None:
    """Return why the CPU cannot be used, which is never."""
    return None


def current_index() -> int:
    """Return the index of the one CPU."""
    return 0


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], index: int, stream: int) -> tuple[Any, int]:
    """Return an uninitialised, aligned, C-ordered NumPy array, and its address.

    Parameters
    ----------
    shape : tuple of int
        Elements along each dimension.
    dtype : numpy.dtype
        A dtype that NumPy can export.
    index, stream : int
        Of the device; the CPU has only 0.

    Raises
    ------
    OutOfMemoryError
        If there is no memory.
    """
    buffer, offset, address, _ = reserve(math.prod(shape) * dtype.itemsize)
    return np.ndarray(shape, dtype, buffer, offset), address


def carve(carrier: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return an array within an array of bytes, whose memory it keeps alive.

    Parameters
    ----------
    carrier : numpy.ndarray
        Of bytes, from `allocate`.
    offset : int
        In bytes.
    shape : tuple of int
        Elements along each dimension.
    dtype : numpy.dtype
        Of the elements.
    """
    return np.ndarray(shape, dtype, carrier, offset)


def full(shape: tuple[int, ...], dtype: np.dtype[Any], element: bytes, index: int, stream: int) -> tuple[Any, int]:
    """Return what `allocate` does, filled with `element`.

    Raises
    ------
    OutOfMemoryError
        If there is no memory.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    buffer, offset, address, zeroed = reserve(nbytes)
    array = np.ndarray(shape, dtype, buffer, offset)
    if nbytes < BY_ROWS:
        array[...] = _element(element, dtype)
    elif not zeroed or any(element):
        _fill_bytes(buffer, offset, nbytes, element, TWO_THREADS_TOUCH if zeroed else TWO_THREADS)
    return array, address


def fill(regions: Sequence[Region], index: int, stream: int) -> None:
    """Fill regions of host memory, one after the other.

    Parameters
    ----------
    regions : sequence of Region
        What to fill. The caller vouches for the addresses and keeps the memory alive.
    index, stream : int
        Of the device; the CPU has only 0.
    """
    for region in regions:
        address, shape, strides, element = normalised(region)
        if 0 not in shape:  # of an empty one the address may be null
            dtype = _UNSIGNED[len(element)]
            _assign(np.ndarray(shape, dtype, _MEMORY, address - _ORIGIN, strides), element)


def assign(array: np.ndarray, element: bytes) -> None:
    """Fill a NumPy array, which needs no address: `fill` by the shortest way.

    Parameters
    ----------
    array : numpy.ndarray
        Writable, of any dtype and strides.
    element : bytes
        As long as an element of the array.
    """
    _assign(array.view(_UNSIGNED[len(element)]), element)


def fill_stretch(address: int, nbytes: int, element: bytes) -> None:
    """Fill one stretch of host memory: `fill` by the shortest way.

    Parameters
    ----------
    address : int
        Of the first byte; the caller vouches for it.
    nbytes : int
        A multiple of the element's length.
    element : bytes
        The element.
    """
    if nbytes:  # or the address may be null
        itemsize = len(element)
        _assign(np.ndarray((nbytes // itemsize,), _UNSIGNED[itemsize], _MEMORY, address - _ORIGIN), element)


def _assign(array: np.ndarray, element: bytes) -> None:
    if array.nbytes >= BY_ROWS and array.flags.c_contiguous:
        _fill_bytes(array, 0, array.nbytes, element, TWO_THREADS)
    else:
        array[...] = _element(element, array.dtype)


def prepare(runs: np.ndarray, strided: Sequence[Region], index: int, stream: int) -> Callable[[int], None]:
    """Return a function that fills many stretches of host memory at once, as often as it is called.

    Short runs of one length are one NumPy assignment through an array of addresses: 10 to 100 ns each,
    where a call for each would cost 10 times that.

    Parameters
    ----------
    runs : numpy.ndarray of RUN
        No two of which intersect.
    strided : sequence of Region
        What is no run.
    index, stream : int
        Of the device; the CPU has only 0.

    Returns
    -------
    callable
        Takes the stream, 0.
    """
    short = (runs["count"] == 1) & (runs["nbytes"] <= ROW)
    scatters: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    alone = [np.flatnonzero(~short)]
    order = np.flatnonzero(short)
    order = order[np.argsort(runs["nbytes"][order], kind="stable")]
    lengths = runs["nbytes"][order]
    bounds = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(order)]
    for start, stop in itertools.pairwise(bounds):
        if stop - start < FEWEST_SCATTERED:
            alone.append(order[start:stop])
        else:
            scatters.append(_scatter(runs[order[start:stop]]))
    regions = [*(_as_region(run) for run in runs[np.concatenate(alone)].tolist()), *strided]

    small = [region for region in regions if region.nbytes < SMALLEST_SHARED]
    tasks = [partial(fill, [region], index, 0) for region in regions if region.nbytes >= SMALLEST_SHARED]

    def run(stream: int) -> None:
        for memory, offsets, tiles in scatters:
            memory[offsets] = tiles
        fill(small, index, stream)
        share(tasks)

    return run


def _scatter(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what fills runs of one length: all of memory in rows of it, the rows' offsets, their contents."""
    nbytes = int(runs["nbytes"][0])
    unit = min(nbytes & -nbytes, TILE)
    dtype = _UNSIGNED[unit]
    # Overlapping rows, one at each byte: an index is an address. So many that their bytes can be counted.
    memory = np.ndarray((2**62 // nbytes, nbytes // unit), dtype, _MEMORY, 0, (1, unit))
    addresses = runs["address"].astype(np.int64)
    tiles = np.stack([runs["tile_low"], runs["tile_high"]], axis=1).view(np.uint8)
    if (addresses % TILE).any():
        tiles = np.take_along_axis(tiles, (addresses[:, None] + np.arange(TILE)) % TILE, axis=1)
    return memory, addresses - _ORIGIN, np.ascontiguousarray(tiles[:, :unit]).view(dtype)


def _as_region(run: tuple[int, ...]) -> Region:
    address, nbytes, pitch, count, low, high = run
    unit = min(nbytes & -nbytes, TILE)
    tile = (low.to_bytes(8, "little") + high.to_bytes(8, "little")) * 2
    start = address % TILE
    element = tile[start : start + unit]
    return Region(address, (count, nbytes // unit), (pitch, unit), element)


def _fill_bytes(buffer: Any, offset: int, nbytes: int, element: bytes, two_threads: int) -> None:
    """Fill bytes of a buffer with a repeated element, from `two_threads` bytes on by two threads."""
    if nbytes < two_threads:
        _copy_rows(buffer, offset, nbytes, element)
        return
    pieces = range(offset, offset + nbytes, PIECE)
    share([partial(_copy_rows, buffer, at, min(PIECE, offset + nbytes - at), element) for at in pieces])


def share(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks by two threads, of which whichever is free takes the next.

    By one, where another call has the second thread already: nobody gains by more than there are cores.

    Parameters
    ----------
    tasks : sequence of callable
        Each of which may run on any thread, while another does.
    """
    left, errors = iter(tasks), list[BaseException]()
    done = _thread.allocate_lock()

    def run() -> None:
        for task in left:
            task()

    def help() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    second_thread = _second_thread
    if len(tasks) < 2 or _cores() < 2 or not second_thread.acquire(blocking=False):
        run()
        return
    try:
        done.acquire()
        # A thread for each call: a pool would be missing in a forked child. And without an object: `threading`
        # waits until it has started, which takes as long as 2 MiB.
        try:
            _thread.start_new_thread(help, ())
        except RuntimeError:  # the system has none left, or the interpreter is ending
            done.release()
        try:
            run()
        finally:
            done.acquire()  # an interrupt must not leave it writing into memory that is then given back
    finally:
        second_thread.release()
    if errors:
        raise errors[0]


_second_thread = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(_second_thread=threading.Lock()))


def _copy_rows(buffer: Any, offset: int, nbytes: int, element: bytes) -> None:
    row = _row(element)
    rows, rest = divmod(nbytes, ROW)
    np.ndarray((rows, ROW), _BYTES, buffer, offset)[...] = row
    if rest:
        np.ndarray((rest,), _BYTES, buffer, offset + rows * ROW)[...] = row[:rest]


# Reading the bytes anew takes half as long as filling a small array with them.
@functools.lru_cache(maxsize=64)
def _element(element: bytes, dtype: np.dtype[Any]) -> np.ndarray:
    return np.frombuffer(element, dtype)


@functools.lru_cache(maxsize=8)
def _row(element: bytes) -> np.ndarray:
    return np.frombuffer(element * (ROW // len(element)), _BYTES)


@functools.cache
def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def copy(target: int, source: int, nbytes: int, index: int, stream: int) -> None:
    """Copy bytes from one address to another; the ranges do not overlap."""
    ctypes.memmove(target, source, nbytes)


def hand_over(carrier: Any, first: int, then: int) -> None:
    """Do nothing: the CPU has no streams."""


def order(first: int, then: int, index: int) -> None:
    """Do nothing: the CPU has no streams."""


def synchronize(index: int, stream: int) -> None:
    """Do nothing: the CPU has finished when a call returns."""
