"""Work that a second thread of the CPU takes part in.

The thread is kept, and waits for more: to wake it takes 10 to 25 us, to start one 35 to 100, in which the
first could have filled megabytes. There is one for the process, and none is left where the process forks.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence

__all__ = ["cores", "share"]

Task = Callable[[], object]


class _Helper:
    """A thread that runs tasks when it is told to."""

    __slots__ = ("_begun", "_core", "_ended", "_error", "_tasks")

    def __init__(self) -> None:
        self._begun, self._ended = _thread.allocate_lock(), _thread.allocate_lock()
        self._begun.acquire()
        self._ended.acquire()
        self._tasks: Iterable[Task] | None = None
        self._core = -1
        self._error: BaseException | None = None
        # Not through `threading`: to join it at exit would be to wait for ever.
        _thread.start_new_thread(self._serve, ())

    def begin(self, tasks: Iterable[Task] | None) -> None:
        """Have the thread run tasks, or end where there are none."""
        self._tasks = tasks
        self._core = _current_core()()
        self._begun.release()

    def end(self) -> None:
        """Wait for the thread, and raise what a task raised there."""
        try:
            self._ended.acquire()
        except BaseException:  # an interrupt must not leave it writing into memory that is then given back
            self._ended.acquire()
            raise
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _serve(self) -> None:
        allowed, avoided = _affinity(), -1
        while True:
            self._begun.acquire()
            tasks, self._tasks = self._tasks, None
            if tasks is None:
                return
            if self._core != avoided:
                avoided = self._core
                # A virtual machine may wake it on the very core that its caller is busy on, though another is idle:
                # Linux takes that for one that the host has taken away. The two would take turns, and gain nothing.
                with contextlib.suppress(OSError):  # no other core is left
                    os.sched_setaffinity(0, allowed - {avoided})
            try:
                for task in tasks:
                    task()
            except BaseException as error:
                self._error = error
            del tasks
            self._ended.release()


@functools.cache
def _current_core() -> Callable[[], int]:
    """Return what tells the core that the caller is on; it says -1 where the system does not."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(AttributeError):
            found: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
            return found
    return lambda: -1


#: The helper, or None before it is first needed; nothing while a call has it. `pop` and `append` are atomic.
_spare: list[_Helper | None] = [None]


def share(tasks: Sequence[Task]) -> None:
    """Run tasks by two threads, of which whichever is free takes the next.

    By one, where another call has the second thread already: nobody gains by more than there are cores.

    Parameters
    ----------
    tasks : sequence of callable
        Each of which may run on any thread, while another does.

    Raises
    ------
    BaseException
        What a task raised, once both threads have ended; tasks that had not begun may then be left out.
    """
    left = iter(tasks)
    helper = _take() if len(tasks) > 1 else None
    if helper is None:
        for task in left:
            task()
        return
    try:
        helper.begin(left)
        try:
            for task in left:
                task()
        finally:
            helper.end()
    finally:
        _spare.append(helper)


def _take() -> _Helper | None:
    if cores() < 2 or sys.is_finalizing():
        return None
    try:
        helper = _spare.pop()
    except IndexError:
        return None
    if helper is None:
        try:
            helper = _Helper()
        except RuntimeError:  # the system has no thread left, or the interpreter is ending
            _spare.append(None)
    return helper


@functools.cache
def cores() -> int:
    """Return how many cores this process may use."""
    return len(_affinity())


def _affinity() -> set[int]:
    """Return the cores that this thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _dismiss() -> None:
    """Let the helper end: a child has no threads but the one that forked, and Python warns of others."""
    try:
        helper = _spare.pop()
    except IndexError:
        return
    if helper is not None:
        helper.begin(None)
    _spare.append(None)


def _begin_anew() -> None:
    _spare[:] = [None]
    cores.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_dismiss, after_in_child=_begin_anew)
