"""Runs cases: which contender takes a turn when, in which process, and how often."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import load
from benchmarks.contest import Case, Contender, MissingError, Row
from benchmarks.processes import Worker, environment
from benchmarks.results import CaseResult, RowResult
from benchmarks.statistics import ratio, summary

#: Seconds that a full run aims to spend on a row, and the minimum number of rounds.
BUDGET, FEWEST_ROUNDS = 3.0, 5
QUICK_ROUNDS = 2

METHOD = (
    "contenders take turns, A B C A B C; median (first quartile - third quartile) of the rounds; a ratio is that of "
    "the samples of one round, ours / peer, so below 1 gpuconst is ahead; contents are checked before anything is "
    "timed; the value is 1.1 where a title says nothing else"
)


class Entry(NamedTuple):
    """A contender, from one of the trees that are compared.

    Attributes
    ----------
    label : str
        The contender's name, with the revision where it is not the working tree's.
    contender : Contender
        The contender itself.
    tree : Path
        The folder from which its process imports gpuconst.
    ours : bool
        Whether it is compared with the others.
    """

    label: str
    contender: Contender
    tree: Path
    ours: bool


def entries(row: Row, trees: Mapping[str, Path]) -> list[Entry]:
    """Return the entries that take part in a row.

    Parameters
    ----------
    row : Row
        The row whose contenders take part.
    trees : mapping of str to Path
        The working tree under an empty name. If there is a second tree, under the name of its revision,
        gpuconst is compared only with itself.
    """
    own = trees[""]
    if len(trees) == 1:
        return [Entry(each.name, each, own, each.ours) for each in row.contenders]
    return [
        Entry(f"{each.name} @ {revision}" if revision else each.name, each, tree, not revision)
        for each in row.contenders
        if each.ours
        for revision, tree in trees.items()
    ]


def run_case(
    name: str, trees: Mapping[str, Path], *, quick: bool, gpu: bool, busy: float, progress: Callable[[float, str], None]
) -> CaseResult:
    """Measure one case.

    Parameters
    ----------
    name : str
        Name of the case.
    trees : mapping of str to Path
        As for `entries`.
    quick : bool
        Whether to do the minimum that exercises everything.
    gpu : bool
        Whether the processes may use GPUs.
    busy : float
        Share of the machine that other processes use, recorded in the result.
    progress : callable
        Takes the number of rows done since the last call, which may be a fraction, and what is being done.

    Returns
    -------
    CaseResult

    Raises
    ------
    RuntimeError
        If gpuconst failed or filled with a wrong value; for a peer this only becomes a remark.
    """
    case = load(name)
    rows = case.rows(quick)
    contest = _Contest(name, case, rows, trees, quick, gpu, progress)
    if case.fresh:
        contest.run_fresh()
    else:
        contest.run_warm()
    return CaseResult(case.title, case.unit, case.axis, busy, [contest.result(index) for index in range(len(rows))])


class _Contest:
    def __init__(
        self,
        name: str,
        case: Case,
        rows: Sequence[Row],
        trees: Mapping[str, Path],
        quick: bool,
        gpu: bool,
        progress: Callable[[float, str], None],
    ) -> None:
        self._name, self._case, self._rows, self._trees = name, case, rows, trees
        self._quick, self._gpu, self._progress = quick, gpu, progress
        self._samples: list[dict[str, list[float]]] = [{} for _ in rows]
        self._missing: list[dict[str, str]] = [{} for _ in rows]

    def run_warm(self) -> None:
        """Take turns within processes that live as long as the case."""
        workers: dict[tuple[Path, tuple[tuple[str, str], ...]], Worker] = {}
        with contextlib.ExitStack() as stack:
            for index, row in enumerate(self._rows):
                present: list[tuple[Entry, Worker]] = []
                for entry in entries(row, self._trees):
                    variables = {**row.environment, **entry.contender.environment}
                    key = entry.tree, tuple(sorted(variables.items()))
                    if key not in workers:
                        workers[key] = stack.enter_context(Worker(environment(entry.tree, self._gpu, variables)))
                    if self._prepare(index, entry, workers[key]):
                        present.append((entry, workers[key]))
                start = time.perf_counter()
                for entry, worker in present:  # warm-up, and to measure the length of a round
                    self._ask("sample", index, entry, worker)
                for _ in range(self._rounds(time.perf_counter() - start)):
                    for entry, worker in present:
                        self._samples[index].setdefault(entry.label, []).append(
                            self._ask("sample", index, entry, worker)
                        )
                for worker in workers.values():
                    worker.ask("forget")
                self._progress(1, f"{self._name}: {row.label}")

    def run_fresh(self) -> None:
        """Take turns in a new process for each contender and round."""
        lanes: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[int, Entry]]] = {}
        for index, row in enumerate(self._rows):
            for entry in entries(row, self._trees):
                variables = {**row.environment, **entry.contender.environment}
                lanes.setdefault((entry.label, tuple(sorted(variables.items()))), []).append((index, entry))
        turns = sum(map(len, lanes.values()))
        rounds = 1 if self._quick else self._case.rounds
        for _ in range(rounds):
            for (_, extra), lane in lanes.items():
                with Worker(environment(lane[0][1].tree, self._gpu, dict(extra))) as worker:
                    for index, entry in lane:
                        if self._prepare(index, entry, worker):
                            sample = self._ask("sample", index, entry, worker)
                            self._samples[index].setdefault(entry.label, []).append(sample)
                        self._progress(len(self._rows) / turns / rounds, f"{self._name}: {entry.label}")

    def result(self, index: int) -> RowResult:
        """Return the results of a row."""
        row, samples = self._rows[index], self._samples[index]
        present = [entry for entry in entries(row, self._trees) if entry.label in samples]
        ours = [entry for entry in present if entry.ours]
        peers = [entry for entry in present if not entry.ours]
        alone = len(self._trees) == 1
        return RowResult(
            row.label,
            row.x,
            row.nbytes,
            {label: summary(values) for label, values in samples.items()},
            [our.label for our in ours],
            [peer.label for peer in peers if peer.contender.beside],
            {
                our.label: {
                    peer.label: ratio(samples[our.label], samples[peer.label])
                    for peer in peers
                    if alone or peer.contender.name == our.contender.name
                }
                for our in ours
            },
            self._missing[index],
        )

    def _prepare(self, index: int, entry: Entry, worker: Worker) -> bool:
        try:
            self._ask("prepare", index, entry, worker)
        except MissingError as error:
            self._missing[index][entry.label] = str(error)
            return False
        except RuntimeError as error:
            if entry.ours:
                raise
            self._missing[index][entry.label] = str(error).splitlines()[0]  # said in the table
            return False
        return True

    def _ask(self, do: str, index: int, entry: Entry, worker: Worker) -> float:
        answer: float = worker.ask(do, case=self._name, row=index, contender=entry.contender.name, quick=self._quick)
        return answer

    def _rounds(self, seconds: float) -> int:
        if self._quick:
            return QUICK_ROUNDS
        return min(self._case.rounds, max(FEWEST_ROUNDS, int(BUDGET / max(seconds, 1e-9))))
