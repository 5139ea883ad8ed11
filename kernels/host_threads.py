"""CPU work that a second thread takes part in.

The thread is kept, and waits for more: waking it takes 10 to 25 us, starting one 35 to 100, in which the
first could have filled megabytes. There is one per process, and it ends before the process forks.

An interrupt may come between any two lines of the thread that receives it. So what two threads have to agree
on is settled by one repeatable call, ``setdefault`` on a dict: the first answer holds for both.
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
    """Tasks for two threads: whichever is free takes the next one.

    Attributes
    ----------
    left : iterator of callable
        The tasks that have not begun.
    cores : set of int
        The cores that the caller may run on.
    core : int
        The core that the caller is on; -1 if the system does not tell.
    taken : dict
        Who has the second thread's part, once that is settled: the helper, or the work itself if the
        caller finished before the helper was awake.
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

    def run(self, helper: _Helper) -> None:
        """Do the second thread's part, unless the caller has finished, or the part is done."""
        if self.ended or self.taken.setdefault("by", helper) is not helper:
            return
        try:
            for task in self.left:
                task()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._signal.release()

    def join(self) -> None:
        """Wait for the helper, if it has begun, and free it for other work."""
        if self.taken.setdefault("by", self) is not self and not self.ended:
            self._signal.acquire()
        if _pending.get("work") is self:
            del _pending["work"]
        self.over = True


class _Helper:
    """The second thread: when woken, it takes part in the work that is pending."""

    __slots__ = ("_alive", "_asleep", "_dismissed")

    def __init__(self) -> None:
        self._dismissed = False
        self._asleep, self._alive = _thread.allocate_lock(), _thread.allocate_lock()
        self._asleep.acquire()
        self._alive.acquire()
        # Not through `threading`, which would join it at exit, and wait for ever.
        _thread.start_new_thread(self._serve, ())

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake already; a look first could be out of date
            self._asleep.release()

    def dismiss(self) -> None:
        """End the thread, and wait until it has ended; not for ever, since the interpreter may have stopped it."""
        self._dismissed = True
        self.wake()
        self._alive.acquire(timeout=1)

    def _serve(self) -> None:
        avoided: tuple[set[int], int] = set(), -1
        while not self._dismissed:
            self._asleep.acquire()
            work = _pending.get("work")
            if work is None:
                continue
            if (work.cores, work.core) != avoided:
                avoided = work.cores, work.core
                # A virtual machine may wake it on the very core that its caller is busy on, though another is idle:
                # Linux believes that the host has taken the idle one away. The two would take turns, and gain nothing.
                with contextlib.suppress(AttributeError, OSError):
                    os.sched_setaffinity(0, work.cores - {work.core})
            work.run(self)
            del work
        self._alive.release()


#: The work for the helper, if there is any.
_pending: dict[str, _Work] = {}
_helper: _Helper | None = None


def share(tasks: Sequence[Task]) -> None:
    """Run tasks on two threads: whichever is free takes the next one.

    On one thread if another call already has the second: more threads than cores gain nothing.

    Parameters
    ----------
    tasks : sequence of callable
        Each may run on any thread, at the same time as another.

    Raises
    ------
    BaseException
        What a task raised, or an interrupt, once both threads have finished; tasks that had not begun are
        then skipped.
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
                _submit(work)
                for task in work.left:
                    task()
            collections.deque(work.left, maxlen=0)
            work.join()
        except BaseException as error:
            failed = error
    failed = failed or work.error
    if failed is not None:
        raise failed


def _submit(work: _Work) -> None:
    """Give work to the helper, if it has no other."""
    global _helper
    if _pending.setdefault("work", work) is work:
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
    """Return a function that returns the core that its caller is on, or -1 if the system does not tell."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(AttributeError):
            found: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
            return found
    return lambda: -1


def _dismiss() -> None:
    """End the helper: a child has only the thread that forked, and Python warns if there were more."""
    global _helper
    if _helper is not None and not _pending:
        helper, _helper = _helper, None
        helper.dismiss()


def _begin_anew() -> None:
    global _helper
    _pending.clear()
    _helper = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_dismiss, after_in_child=_begin_anew)
