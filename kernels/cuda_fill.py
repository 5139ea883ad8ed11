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
        """Return memory from `allocate`, filled with `element` in stream order, and its address."""
        memory, address = self._allocate(nbytes, index, stream)
        self.fill_stretch(address, nbytes, element, index, stream)
        return memory, address

    def fill_stretch(self, address: int, nbytes: int, element: bytes, index: int, stream: int) -> None:
        """Fill one stretch of device memory, in stream order."""
        if nbytes:
            self._launch(run_launch(address, nbytes, *tile(address, element)), index, stream)

    def fill(self, region: Region, index: int, stream: int) -> None:
        """Fill a region of device memory, in stream order."""
        for launch in region_launches(region):
            self._launch(launch, index, stream)

    def prepare(self, runs: np.ndarray, strided: Sequence[Region], index: int, stream: int) -> Callable[[int], None]:
        """Return a function that fills many runs in one launch, with the help of a table of them in device memory."""
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
