"""Device memory that is given back only once the streams it was handed to are done with it."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from . import cuda_driver


class Handle(int):
    """A stream's handle that keeps the stream alive: memory may be given back on it long after the call.

    Attributes
    ----------
    owner : object
        The stream.
    """

    owner: Any

    def __new__(cls, value: int, owner: Any = None) -> Self:
        """Return the handle `value` of a stream."""
        handle = super().__new__(cls, value)
        handle.owner = owner
        return handle

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the protocol of CUDA's Python libraries, and the handle."""
        return 0, int(self)


class Lease:
    """Memory of a pool, and the streams that use it.

    Pools reuse freed memory in the order of the stream that it was allocated on. Work on another stream,
    such as a consumer's, may still be reading it then, so that stream is waited for first, on the device.
    While one of them is being captured into a CUDA graph, nothing can be ordered after it, and freeing memory
    on it would spoil the graph: the memory is kept until the capture has ended.

    Parameters
    ----------
    memory : object
        Gives the memory back to its pool when nothing refers to it any more.
    index : int
        Index of the device.
    stream : int
        Handle of the stream that the memory was allocated on.
    by_stream : bool
        Whether giving the memory back is itself work on the stream, not on the host alone.

    Attributes
    ----------
    index : int
        Index of the device.
    """

    __slots__ = ("_by_stream", "_memory", "_stream", "_users", "index")

    def __init__(self, memory: Any, index: int, stream: int, *, by_stream: bool) -> None:
        self._memory = memory
        self.index = index
        # A pool reuses the memory on the thread that it came from, whichever thread gives it back.
        self._stream = stream if by_stream else cuda_driver.on_any_thread(stream)
        self._by_stream = by_stream
        self._users: dict[int, int] = {}
        self.used_on(stream)

    def used_on(self, stream: int) -> None:
        """Make the memory wait, before it goes back, for the work given to a stream.

        A stream that is known only by its number must live as long as the memory.
        """
        stream = cuda_driver.on_any_thread(stream)
        if stream != self._stream and not isinstance(self._users.get(stream), Handle):
            self._users[stream] = stream

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():  # the memory will not be used again, and consumers' streams are gone
            return
        _give_back_or_keep(self)

    def _given_back(self) -> bool:
        """Give the memory back, and return whether that was possible."""
        users = list(self._users.values())
        if users or self._by_stream:
            for stream in (self._stream, *users):
                with contextlib.suppress(RuntimeError):  # the stream or its context is gone
                    if cuda_driver.is_capturing(self.index, stream):
                        return False
        for stream in users:
            with contextlib.suppress(RuntimeError):
                cuda_driver.order(stream, self._stream, self.index)
        if self._by_stream:  # some pools do it on whichever device is current
            with (
                contextlib.suppress(RuntimeError),
                cuda_driver.primary_context(self.index),
                cuda_driver.AnyCaptureMode(),
            ):
                self._memory = None
        self._memory = None  # while its stream still lives
        return True


#: Leases that could not be given back while a graph was captured.
_kept: deque[Lease] = deque()


def give_back() -> None:
    """Give back memory that was kept because of captures which have ended."""
    for _ in range(len(_kept)):
        try:
            lease = _kept.popleft()
        except IndexError:  # another thread was faster
            return
        _give_back_or_keep(lease)


def _give_back_or_keep(lease: Lease) -> None:
    """Give a lease back, or keep it if that is not possible yet, or was interrupted."""
    given_back = False
    try:
        given_back = lease._given_back()
    finally:
        if not given_back:
            _kept.append(lease)


def hand_over(memory: Lease, first: int, then: int) -> None:
    """Make stream `then` wait for stream `first`; the memory is given back when `then` is done with it.

    Parameters
    ----------
    memory : Lease
        From a backend's ``allocate`` or ``full``.
    first, then : int
        Handles of streams.
    """
    cuda_driver.order(first, then, memory.index)
    memory.used_on(then)
