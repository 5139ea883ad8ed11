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
    """

    __slots__ = ("_index", "_memory", "_stream", "_users")

    def __init__(self, memory: Any, index: int, stream: int) -> None:
        self._memory = memory
        self._index = index
        self._stream = stream
        self._users: set[int] = set()

    def hand_over(self, first: int, then: int) -> None:
        """Make stream `then` wait for stream `first`, and the memory for `then`."""
        cuda_driver.order(first, then, self._index)
        self._users.add(then)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():  # nobody gets the memory next, and consumers' streams are gone
            return
        for stream in self._users:
            with contextlib.suppress(Exception):  # the context is gone, and what ran in it
                cuda_driver.order(stream, self._stream, self._index)
