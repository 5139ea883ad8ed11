"""Work that a second thread of the CPU takes part in.

The thread is kept, and waits for more: to wake it takes 10 to 25 us, to start one 35 to 100, in which the
first could have filled megabytes. There is one for the process, and none is left where the process forks.

An interrupt may come between any two lines of the thread that it is for. So what two threads have to agree
on is one call that may be repeated, ``setdefault`` on a dict: the first answer holds for both.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence

__all__ = ["cores", "share"]

Task = Callable[[], object]


class _Work:
    """Tasks, of which whichever of two threads is free takes the next.

    Attributes
    ----------
    left : iterator of callable
        The tasks that have not begun.
    cores : set of int
        Those that the caller may run on.
    core : int
        The one that it is on, -1 where the system does not tell.
    taken : dict
        Who has the second thread's part, once that is settled: the helper, or the work itself, when the
        caller has ended before the helper was awake.
    ended : bool
        Whether the helper has done its part.
    over : bool
        Whether both threads are done.
    error : BaseException or None
        What a task raised in the helper.
    """

    __slots__ = ("_signal", "core", "cores", "ended", "error", "left", "over", "taken")

    def __init__(self, tasks: Sequence[Task], cores: set[int]) -> None:
        self.left = iter(tasks)
        self.cores = cores
        self.core = _current_core()()
        self.taken: dict[str, object] = {}
        self.ended = self.over = False
        self.error: BaseException | None = None
        self._signal = _thread.allocate_lock()
        self._signal.acquire()

    def help(self, helper: _Helper) -> None:
        """Do the second thread's part, unless the caller has ended, or it is done."""
        if self.ended or self.taken.setdefault("by", helper) is not helper:
            return
        try:
            for task in self.left:
                task()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._signal.release()

    def settle(self) -> None:
        """Wait for the helper, if it has begun, and let others have it."""
        if self.taken.setdefault("by", self) is not self and not self.ended:
            self._signal.acquire()
        if _desk.get("work") is self:
            del _desk["work"]
        self.over = True


class _Helper:
    """The second thread: takes part in the work that lies on the desk when it is woken."""

    __slots__ = ("_asleep", "dismissed")

    def __init__(self) -> None:
        self.dismissed = False
        self._asleep = _thread.allocate_lock()
        self._asleep.acquire()
        # Not through `threading`: to join it at exit would be to wait for ever.
        _thread.start_new_thread(self._serve, ())

    def wake(self) -> None:
        if self._asleep.locked():
            self._asleep.release()

    def _serve(self) -> None:
        avoided: tuple[set[int], int] = set(), -1
        while not self.dismissed:
            self._asleep.acquire()
            work = _desk.get("work")
            if work is None:
                continue
            if (work.cores, work.core) != avoided:
                avoided = work.cores, work.core
                # A virtual machine may wake it on the very core that its caller is busy on, though another is idle:
                # Linux takes that for one that the host has taken away. The two would take turns, and gain nothing.
                with contextlib.suppress(AttributeError, OSError):
                    os.sched_setaffinity(0, work.cores - {work.core})
            work.help(self)
            del work


#: The work that the helper is for, none or one.
_desk: dict[str, _Work] = {}
_helper: _Helper | None = None


def share(tasks: Sequence[Task]) -> None:
    """Run tasks by two threads, of which whichever is free takes the next.

    By one, where another call has the second thread already: more threads than cores gain nothing.

    Parameters
    ----------
    tasks : sequence of callable
        Each of which may run on any thread, while another does.

    Raises
    ------
    BaseException
        What a task raised, or an interrupt, once both threads have ended; tasks that had not begun are then
        left out.
    """
    allowed = cores() if len(tasks) > 1 else set()
    if len(allowed) < 2 or sys.is_finalizing():
        for task in tasks:
            task()
        return
    work = _Work(tasks, allowed)
    failed: BaseException | None = None
    while not work.over:
        try:
            if failed is None:
                _offer(work)
                for task in work.left:
                    task()
            collections.deque(work.left, maxlen=0)
            work.settle()
        except BaseException as error:
            failed = error
    failed = failed or work.error
    if failed is not None:
        raise failed


def _offer(work: _Work) -> None:
    """Have the helper take part in some work, if it has no other."""
    global _helper
    if _desk.setdefault("work", work) is work:
        if _helper is None:
            with contextlib.suppress(RuntimeError):  # the system has no thread left, or the interpreter is ending
                _helper = _Helper()
        if _helper is not None:
            _helper.wake()


def cores() -> set[int]:
    """Return the cores that the calling thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


@functools.cache
def _current_core() -> Callable[[], int]:
    """Return what tells the core that the caller is on; it says -1 where the system does not."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(AttributeError):
            found: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
            return found
    return lambda: -1


def _dismiss() -> None:
    """Let the helper end: a child has no threads but the one that forked, and Python warns of more."""
    global _helper
    if _helper is not None and not _desk:
        _helper.dismissed = True
        _helper.wake()
        _helper = None


def _begin_anew() -> None:
    global _helper
    _desk.clear()
    _helper = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_dismiss, after_in_child=_begin_anew)
