"""Three timings of a GPU's work: on the device, on the host until the call returns, and from start to end.

All work is on the legacy default stream, which torch, CuPy, Numba and the driver share.
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
#: Free memory that a case requires, in multiples of the bytes it asks for: the card may be shared.
_ROOM = 2
#: Clock cycles that the device waits per call: some 25 us, in which most hosts have enqueued it; then more, for those
#: that have not.
_CYCLES_A_CALL = 50_000, 400_000


def on_each_backend(contender: Contender) -> list[Contender]:
    """Return one of our contenders for each backend that fills on GPUs, in a process of its own."""

    def make(**arguments: Any) -> Callable[[], Any]:
        import gpuconst

        try:
            return contender.make(**arguments)
        except gpuconst.DeviceUnavailableError as error:  # either library may be missing
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
        If this torch has no CUDA: memory and events are torch's.
    """
    import torch

    if not torch.cuda.is_available():
        raise MissingError("this torch cannot use CUDA, and memory and events are torch's")
    return torch


def jax_cuda() -> Any:
    """Return JAX, with CUDA in use.

    Raises
    ------
    MissingError
        If this JAX has no CUDA: it would fill on the CPU.
    """
    import jax

    if jax.default_backend() != "gpu":
        raise MissingError("this JAX cannot use CUDA")
    return jax


def need(nbytes: int) -> None:
    """Raise MissingError unless twice as many bytes are free on the card."""
    free, _ = torch_cuda().cuda.mem_get_info()
    if free < _ROOM * nbytes:
        raise MissingError(f"{free / GIB:.1f} GiB are free on the card, {_ROOM * nbytes / GIB:.1f} GiB are wanted")


def device_seconds(turns: Iterator[Callable[[], Any]], number: int) -> float:
    """Return the seconds that one call takes on the device, by events.

    The device is kept waiting while the host enqueues the calls, so that it then goes from one to the next
    without a gap, however slow the host is; this does not help calls that themselves wait for the device.

    Parameters
    ----------
    turns : iterator of callable
        Continues from one sample to the next, and when one is taken again, so that no memory is still in the cache.
    number : int
        Number of calls between the events.
    """
    torch = torch_cuda()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in _CYCLES_A_CALL:
        runs = list(itertools.islice(turns, number))
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
    """Return the seconds until one call returns, without waiting for the device.

    Parameters
    ----------
    run : callable
        A call that the device completes faster than the host enqueues it.
    number : int
        Number of calls; fewer than the 1024 that the driver's queue holds.
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
    """Return the seconds that a call takes, including its work on the device.

    Parameters
    ----------
    run : callable
        The call to measure.
    number : int
        Number of calls, each waited for.
    wait : callable, optional
        Takes the result of a call, and waits for it; by default, waits for the device.
    """
    synchronize = torch_cuda().cuda.synchronize
    wait = wait or (lambda result: synchronize())
    run()
    synchronize()
    start = time.perf_counter()
    for _ in range(number):
        wait(run())
    return (time.perf_counter() - start) / number
