"""Device memory that is given back only when the streams it was handed to are done with it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from . import cuda_driver


class Lease:
    """Memory of a pool, and the streams that use it.

    Pools give freed memory to the next request in the order of the stream that it was allocated on.
    Work on another stream, a consumer's, may still be reading it by then, so that stream is waited for
    first, on the device. A stream must live as long as memory that was handed to it.

    Parameters
    ----------
    memory : object
        Gives the memory back to its pool when it is let go of.
    index : int
        Of the device.
    stream : int
        Handle of the stream that the memory was allocated on.

    Attributes
    ----------
    index : int
        Of the device.
    users : set of int
        Handles of the streams it was handed to.
    """

    __slots__ = ("_memory", "_stream", "index", "users")

    def __init__(self, memory: Any, index: int, stream: int) -> None:
        self._memory = memory
        self.index = index
        self._stream = stream
        self.users: set[int] = set()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():  # nobody gets the memory next, and consumers' streams are gone
            return
        for stream in self.users:
            with contextlib.suppress(Exception):  # the context is gone, and what ran in it
                cuda_driver.order(stream, self._stream, self.index)


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
    memory.users.add(then)
