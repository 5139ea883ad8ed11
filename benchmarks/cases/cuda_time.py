"""Three times of a GPU's work: on the device, on the host until the call is back, and from start to end.

All work is on the legacy default stream, the one that torch, CuPy, Numba and the driver share.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.contest import Contender, MissingError

GIB = 2**30
BACKENDS = ("cupy", "numba")
#: Free memory that a case wants, in multiples of what it fills: the card may be shared.
_ROOM = 2
#: Clock cycles of the device for each call, some 25 us, in which most hosts have enqueued it; then for those that
#: have not.
_CYCLES_A_CALL = 50_000, 400_000


def on_each_backend(contender: Contender) -> list[Contender]:
    """Return one of our contenders for each backend that fills on GPUs, in a process of its own."""

    def make(**arguments: Any) -> Callable[[], Any]:
        import gpuconst

        try:
            return contender.make(**arguments)
        except gpuconst.DeviceUnavailableError as error:  # one library alone serves
            raise MissingError(str(error)) from error

    return [
        replace(contender, name=f"{contender.name}, {backend}", make=make, environment={"GPUCONST_BACKEND": backend})
        for backend in BACKENDS
    ]


def torch_cuda() -> Any:
    """Return torch, with CUDA in use.

    Raises
    ------
    MissingError
        If this torch has no CUDA: memory and events are its.
    """
    import torch

    if not torch.cuda.is_available():
        raise MissingError("this torch cannot use CUDA, and memory and events are torch's")
    return torch


def need(nbytes: int) -> None:
    """Raise MissingError unless twice as many bytes are free on the card."""
    free, _ = torch_cuda().cuda.mem_get_info()
    if free < _ROOM * nbytes:
        raise MissingError(f"{free / GIB:.1f} GiB are free on the card, {_ROOM * nbytes / GIB:.1f} GiB are wanted")


def device_seconds(turns: Iterator[Callable[[], Any]], number: int) -> float:
    """Return the seconds that one call takes on the device, by events.

    The device is kept waiting while the host enqueues, so that it then goes from call to call without a
    gap, however slow the host; a call that itself waits for the device cannot profit.

    Parameters
    ----------
    turns : iterator of callable
        Goes on from one sample to the next, so that no memory is in the cache still.
    number : int
        Of calls between the events.
    """
    torch = torch_cuda()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    runs = list(itertools.islice(turns, number))
    for cycles in _CYCLES_A_CALL:
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles * number)
        start.record()
        for run in runs:
            run()
        stop.record()
        was_kept_waiting = not start.query()
        stop.synchronize()
        if was_kept_waiting:
            break
    return float(start.elapsed_time(stop)) / 1e3 / number


def host_seconds(run: Callable[[], Any], number: int) -> float:
    """Return the seconds until one call is back, the device's own work not waited for.

    Parameters
    ----------
    run : callable
        One that the device does faster than the host enqueues it.
    number : int
        Of calls; fewer than the 1024 that the driver's queue holds.
    """
    torch = torch_cuda()
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / number


def total_seconds(run: Callable[[], Any], number: int, wait: Callable[[Any], object] | None = None) -> float:
    """Return the seconds of a call and of all that it has the device do.

    Parameters
    ----------
    run : callable
        What is measured.
    number : int
        Of calls, each waited for.
    wait : callable, optional
        Takes what a call returned, and waits for that; by default the device is waited for.
    """
    synchronize = torch_cuda().cuda.synchronize
    wait = wait or (lambda result: synchronize())
    run()
    synchronize()
    start = time.perf_counter()
    for _ in range(number):
        wait(run())
    return (time.perf_counter() - start) / number
