"""Filling regions on a GPU: the part that does not depend on the library that allocates and launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from . import cuda_driver
from .cuda_lease import Lease
from .runs import Launch, Region, region_launches, row_launch, strided_launches, table, table_launch

#: A backend's `allocate`: takes bytes, device and stream; returns the owner of the memory, and its address.
Allocate = Callable[[int, int, int], tuple[Lease, int]]
#: Launches a kernel on a device and stream.
Start = Callable[[Launch, int, int], None]


def capturable(start: Start) -> Start:
    """Return `start`, changed to allow a kernel's first launch on a device, which loads it, under capture too."""
    loaded: set[tuple[str, int]] = set()

    @functools.wraps(start)
    def launched(launch: Launch, index: int, stream: int) -> None:
        key = launch.kernel, index
        if key in loaded:
            start(launch, index, stream)
            return
        with cuda_driver.any_capture_mode():
            start(launch, index, stream)
        loaded.add(key)

    return launched


def fill(region: Region, index: int, stream: int, start: Start) -> None:
    """Fill a region of device memory, in stream order.

    Parameters
    ----------
    region : Region
        What to fill. The caller vouches for the addresses and keeps the memory alive.
    index, stream : int
        Index of the device; handle of the stream.
    start : callable
        The backend's launch function.
    """
    for launch in region_launches(region):
        start(launch, index, stream)


def prepare(
    runs: np.ndarray, strided: Sequence[Region], index: int, stream: int, allocate: Allocate, start: Start
) -> Callable[[int], None]:
    """Prepare memory of one device to be filled any number of times.

    Parameters
    ----------
    runs : numpy.ndarray of RUN
        Each of at least one byte; none intersects another. The caller keeps the memory alive.
    strided : sequence of Region
        The regions that are not runs, normalised.
    index : int
        Index of the device.
    stream : int
        The stream on which the table of runs is made, and given back when the result is no longer used.
        Before the first fill on another stream, wait for this one.
    allocate, start : callable
        The backend's functions.

    Returns
    -------
    callable
        Fills the memory on the stream that it is given. While that stream is being captured into a graph,
        it only launches kernels, and must then live as long as the graph.

    Raises
    ------
    OutOfMemoryError
        If there is no memory for the table.
    RuntimeError
        If a table is needed while a graph is being captured.
    """
    launches: list[Launch] = []
    memory = None
    if len(runs) == 1:
        launches.append(row_launch(*runs[0].item()))
    elif len(runs):
        words = table(runs)
        memory, address = allocate(words.nbytes, index, stream)
        cuda_driver.upload(address, words, index, stream)
        launches.append(table_launch(address, words))
    for region in strided:
        launches.extend(strided_launches(region))

    def run(on: int) -> None:
        for launch in launches:
            start(launch, index, on)
        if memory is not None:
            memory.used_on(on)  # the table goes back to its pool once these streams are done with it

    return run
