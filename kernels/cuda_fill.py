"""Filling regions on a GPU: the part that does not depend on the library that allocates and launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import cuda_driver
from .cuda_lease import Lease
from .runs import Launch, Region, region_launches, row_launch, run_launch, strided_launches, table, table_launch, tile


class Filler:
    """Fills device memory with the kernels of one backend, of which its methods are the functions.

    Parameters
    ----------
    allocate : callable
        The backend's `allocate`: takes bytes, device and stream; returns the owner of the memory, and its address.
    start : callable
        Launches a kernel on a device and stream.
    """

    def __init__(
        self, allocate: Callable[[int, int, int], tuple[Lease, int]], start: Callable[[Launch, int, int], None]
    ) -> None:
        self._allocate = allocate
        self._start = start
        self._started: set[tuple[str, int]] = set()

    def full(self, nbytes: int, element: bytes, index: int, stream: int) -> tuple[Lease, int]:
        """Return memory from `allocate`, filled with `element` in stream order, and its address.

        Raises
        ------
        OutOfMemoryError
            If the device has no room.
        RuntimeError
            If a CUDA graph is being captured.
        """
        memory, address = self._allocate(nbytes, index, stream)
        self.fill_stretch(address, nbytes, element, index, stream)
        return memory, address

    def fill_stretch(self, address: int, nbytes: int, element: bytes, index: int, stream: int) -> None:
        """Fill one stretch of device memory, in stream order; the short way, which most fills take.

        Parameters
        ----------
        address : int
            Of the first byte. The caller vouches for it and keeps the memory alive.
        nbytes : int
            A multiple of the element's length.
        element : bytes
            The element.
        index, stream : int
            Index of the device; handle of the stream.
        """
        if nbytes:
            self._launch(run_launch(address, nbytes, *tile(address, element)), index, stream)

    def fill(self, region: Region, index: int, stream: int) -> None:
        """Fill a region of device memory, in stream order.

        Parameters
        ----------
        region : Region
            What to fill. The caller vouches for the addresses and keeps the memory alive.
        index, stream : int
            Index of the device; handle of the stream.
        """
        for launch in region_launches(region):
            self._launch(launch, index, stream)

    def prepare(self, runs: np.ndarray, strided: Sequence[Region], index: int, stream: int) -> Callable[[int], None]:
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
            memory, address = self._allocate(words.nbytes, index, stream)
            cuda_driver.upload(address, words, index, stream)
            launches.append(table_launch(address, words))
        for region in strided:
            launches.extend(strided_launches(region))

        def run(on: int) -> None:
            for launch in launches:
                self._launch(launch, index, on)
            if memory is not None:
                memory.used_on(on)  # the table goes back to its pool once these streams are done with it

        return run

    def _launch(self, launch: Launch, index: int, stream: int) -> None:
        key = launch.kernel, index
        if key in self._started:
            self._start(launch, index, stream)
            return
        with cuda_driver.AnyCaptureMode():  # the first launch on a device loads the kernel
            self._start(launch, index, stream)
        self._started.add(key)
