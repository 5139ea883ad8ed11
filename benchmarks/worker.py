"""The process that contenders run in: serves requests over a pipe, one JSON line each way."""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.cases import load
from benchmarks.contest import Case, Contender, MissingError

#: Seconds that one sample of a loop takes, in a full run and in a quick one.
SAMPLE, QUICK_SAMPLE = 0.01, 0.0005
#: Seconds of rest before a sample: OpenMP's threads keep spinning for about as long, on the other core.
REST = 0.01


class _Worker:
    def __init__(self) -> None:
        self._prepared: dict[tuple[int, str], tuple[Callable[[], Any], int]] = {}

    def prepare(self, case: str, row: int, contender: str, quick: bool) -> None:
        """Prepare a contender, check its work, and find out how often to repeat it."""
        rules, entrant, arguments = _find(case, row, contender, quick)
        _use_threads(entrant)
        run = entrant.make(**arguments)
        number = 1
        if rules.check is not None:
            rules.check(run())
            number = _repetitions(run, QUICK_SAMPLE if quick else SAMPLE)
        self._prepared[row, contender] = run, number
        gc.freeze()  # objects of imports and preparation are not to be collected at the contender's cost

    def sample(self, case: str, row: int, contender: str, quick: bool) -> float:
        """Return one sample: seconds per call, or the figure that the contender returns."""
        rules, entrant, _ = _find(case, row, contender, quick)
        run, number = self._prepared[row, contender]
        _use_threads(entrant)
        if rules.check is None:
            return float(run())
        time.sleep(REST)
        # Touches and frees as many bytes: pages that went back to the host take 30 times as long.
        run()
        return _seconds(run, number) / number

    def forget(self) -> None:
        """Drop everything that was prepared."""
        self._prepared.clear()


def _find(case: str, row: int, contender: str, quick: bool) -> tuple[Case, Contender, dict[str, Any]]:
    rules = load(case)
    found = rules.rows(quick)[row]
    return rules, next(each for each in found.contenders if each.name == contender), dict(found.arguments)


def _use_threads(contender: Contender) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        threads = contender.threads or len(os.sched_getaffinity(0))
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _seconds(run: Callable[[], Any], number: int) -> float:
    start = time.perf_counter()
    for _ in itertools.repeat(None, number):
        run()
    return time.perf_counter() - start


def _repetitions(run: Callable[[], Any], target: float) -> int:
    number = 1
    while (seconds := _seconds(run, number)) < target / 2:
        number = max(2 * number, int(number * min(100.0, target / 2 / max(seconds, 1e-9))))
    return max(1, round(number * target / seconds)) if number > 1 else 1


def failure(error: Exception) -> dict[str, str]:
    """Return a reply whose first line says what is wrong; its traceback follows."""
    said, _, _ = str(error).strip().partition("\n")  # not by gpuconst's `first_line`: peers run without gpuconst
    return {"error": f"{type(error).__name__}: {said}\n{traceback.format_exc()}"}


def main() -> None:
    """Serve until the pipe is closed."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not get into the replies
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any]
        try:
            reply = {"value": getattr(worker, request.pop("do"))(**request)}
        except MissingError as error:
            reply = {"missing": str(error)}
        except ImportError as error:
            ours = (error.name or "").partition(".")[0] in ("benchmarks", "gpuconst")
            reply = failure(error) if ours else {"missing": str(error)}
        except Exception as error:
            reply = failure(error)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
