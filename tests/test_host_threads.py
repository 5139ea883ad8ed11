"""Work on the host that two threads share."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from gpuconst.kernels import host_fill, host_threads

needs_two_cores = pytest.mark.skipif(
    len(host_threads.cores()) < 2, reason="one core: everything runs on the calling thread"
)


def test_each_task_runs_once() -> None:
    done: list[int] = []
    host_threads.share([functools.partial(done.append, number) for number in range(1000)])
    assert sorted(done) == list(range(1000))


@needs_two_cores
def test_two_threads_take_part() -> None:
    together = threading.Barrier(2, timeout=30)
    host_threads.share([together.wait, together.wait])  # neither ends before the other has begun


needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the system has no affinity of threads to cores"
)


@needs_two_cores
@needs_affinity
def test_the_second_thread_keeps_off_the_core_of_the_first(run_python: Callable[..., Any]) -> None:
    run_python(
        """
        import os, threading
        from gpuconst.kernels import host_threads

        together = threading.Barrier(2, timeout=30)
        found = {}

        def task():
            together.wait()
            found[threading.current_thread() is threading.main_thread()] = os.sched_getaffinity(0)

        host_threads.share([task, task])
        assert found[False] < found[True] and len(found[True] - found[False]) == 1, found
        """
    )


@needs_two_cores
@needs_affinity
def test_the_second_thread_keeps_off_the_core_that_the_first_has_moved_to(run_python: Callable[..., Any]) -> None:
    run_python(
        """
        import os, threading, time
        from gpuconst.kernels import host_threads

        allowed = os.sched_getaffinity(0)
        together = threading.Barrier(2, timeout=30)
        avoided = set()

        def task():
            together.wait()
            if threading.current_thread() is not threading.main_thread():
                avoided.update(allowed - os.sched_getaffinity(0))

        deadline = time.monotonic() + 30
        while len(avoided) < 2:  # the system may move the first back at once
            assert time.monotonic() < deadline, avoided
            for core in allowed:
                os.sched_setaffinity(0, {core})
                os.sched_setaffinity(0, allowed)
                host_threads.share([task, task])
        """
    )


@needs_two_cores
@needs_affinity
def test_no_core_is_used_that_was_taken_away(run_python: Callable[..., Any]) -> None:
    run_python(
        """
        import os, threading
        from gpuconst.kernels import host_threads

        allowed = os.sched_getaffinity(0)
        together = threading.Barrier(2, timeout=30)
        host_threads.share([together.wait, together.wait])
        for kept in ({core} for core in allowed):
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), kept)
            threads = set()
            host_threads.share([lambda: threads.add(threading.get_ident())] * 1000)
            assert threads == {threading.get_ident()}
            assert all(os.sched_getaffinity(int(thread)) == kept for thread in os.listdir("/proc/self/task"))
        """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@needs_affinity
def test_a_child_on_one_core_has_no_second_thread(run_python: Callable[..., Any]) -> None:
    run_python(
        """
        import os, threading
        from gpuconst.kernels import host_threads

        host_threads.share([lambda: None] * 2)
        child = os.fork()
        if not child:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            threads = set()
            host_threads.share([lambda: threads.add(threading.get_ident())] * 1000)
            os._exit(len(threads) != 1 or len(os.listdir("/proc/self/task")) != 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_is_raised_when_both_threads_have_ended(bad: int) -> None:
    ended: list[int] = []

    def task(number: int) -> None:
        if number == bad:
            raise MemoryError(f"no room for {number}")
        ended.append(number)

    with pytest.raises(MemoryError, match=f"no room for {bad}"):
        host_threads.share([functools.partial(task, number) for number in range(3)])
    count = len(ended)
    host_threads.share([functools.partial(ended.append, 9)] * 2)
    assert len(ended) == count + 2


@needs_two_cores
def test_no_third_thread() -> None:
    threads: set[int] = set()
    together = threading.Barrier(2, timeout=30)

    def inner() -> None:
        threads.add(threading.get_ident())

    def outer() -> None:
        together.wait()
        host_threads.share([inner] * 50)

    host_threads.share([outer, outer])
    assert len(threads) == 2


def _idents() -> set[int]:
    together, idents = threading.Barrier(2, timeout=30), set[int]()

    def task() -> None:
        idents.add(threading.get_ident())
        together.wait()

    host_threads.share([task, task])
    return idents


@needs_two_cores
def test_the_second_thread_is_kept() -> None:
    idents = _idents()
    assert len(idents) == 2
    assert _idents() == idents


@needs_two_cores
def test_an_interrupt_waits_for_the_second_thread(run_python: Callable[..., Any]) -> None:
    """Else it would write into memory that the caller has given back."""
    run_python(
        """
        import signal, threading, time
        from gpuconst.kernels import host_threads

        together, ended = threading.Barrier(2, timeout=30), []

        def task():
            together.wait()
            if threading.current_thread() is not threading.main_thread():
                time.sleep(1)
                ended.append(True)

        def interrupt(signal, frame):
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            host_threads.share([task, task])
        except KeyboardInterrupt:
            assert ended
        else:
            raise AssertionError("the interrupt was lost")
        together.reset()
        host_threads.share([together.wait, together.wait])  # it goes on serving
        """
    )


#: Shares work, interrupted where Python would see a signal for the n-th time: once a call has returned, when a
#: function begins, and when a loop goes back.
INTERRUPTED = """
    import dis, sys, threading, time
    from gpuconst.kernels import host_threads

    CHECKED = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "RESUME", "JUMP_BACKWARD")
               if name in dis.opmap}
    running, last = set(), {}

    def task():
        running.add(threading.get_ident())
        time.sleep(1e-3)
        running.discard(threading.get_ident())

    def interrupt(frame, event, argument):
        global left
        if frame.f_code.co_filename != host_threads.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = last.get(frame)
            last[frame] = frame.f_code.co_code[frame.f_lasti]
            if before in CHECKED:
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
        return interrupt

    host_threads.share([task, task])
    sys._getframe().f_trace_opcodes = True  # Python 3.12 traces no others', unless it knows before it traces at all
    for n in range(1, 10_000):
        left = n
        last.clear()
        sys.settrace(interrupt)
        try:
            host_threads.share([task] * 4)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            assert not running, f"a task was running after interrupt {n}"
        together = threading.Barrier(2, timeout=30)
        host_threads.share([together.wait, together.wait])  # the second thread goes on serving
        if left > 0:
            break
    print(n)
"""


@needs_two_cores
def test_an_interrupt_at_any_place_waits_for_the_second_thread(run_python: Callable[..., Any]) -> None:
    assert int(run_python(INTERRUPTED)) > 20


@needs_two_cores
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_no_thread_is_left_where_the_process_forks(run_python: Callable[..., Any]) -> None:
    """From Python 3.12 on a fork with other threads is warned of."""
    run_python(
        """
        import _thread, os, threading, warnings

        meanwhile = []
        os.register_at_fork(before=lambda: meanwhile.append(_thread._count()))  # the one registered first runs last

        from gpuconst.kernels import host_threads

        def use_both():
            together = threading.Barrier(2, timeout=30)
            host_threads.share([together.wait, together.wait])

        use_both()
        assert _thread._count() == 1
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")  # not as an error, which Python 3.12 loses
            child = os.fork()
        if not child:
            try:
                use_both()
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert meanwhile == [0]
        assert not warned, warned
        assert os.waitpid(child, 0)[1] == 0
        use_both()
        """,
        OPENBLAS_NUM_THREADS="1",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_forked_meanwhile_has_a_second_thread_of_its_own(run_python: Callable[..., Any]) -> None:
    run_python(
        """
        import os, threading, warnings
        from gpuconst.kernels import host_threads

        forked = []

        def fork():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # there is another thread, rightly
                child = os.fork()
            if not child:
                try:
                    together = threading.Barrier(2, timeout=30)
                    host_threads.share([together.wait, together.wait] if len(host_threads.cores()) > 1 else [int, int])
                except BaseException:
                    os._exit(1)
                os._exit(0)
            forked.append(child)

        host_threads.share([fork, int])
        assert os.waitpid(forked[0], 0)[1] == 0
        """
    )


def test_when_the_interpreter_ends(run_python: Callable[..., Any]) -> None:
    """From Python 3.12 on no thread can be started then."""
    found = run_python(
        f"""
        import atexit, gpuconst
        import numpy as np

        x = np.zeros({host_fill.SHARED_FROM // 4}, np.float32)
        atexit.register(lambda: print(int(gpuconst.fill(x, 2.0).sum()) == 2 * x.size))
        """
    )
    assert "True" in found
