"""The harness gives contenders equal turns, in processes that have what they ask for, and hides no failure of ours."""

import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import harness, machine, trees, worker
from benchmarks.cases.peers import check_filled
from benchmarks.contest import Case, Contender, MissingError, Row
from benchmarks.processes import Worker, environment
from benchmarks.results import CaseResult
from benchmarks.table import case_table
from benchmarks.worker import failure


class _Recorder:
    """Stands in for worker processes, and writes down who was asked for what."""

    asked: list[tuple[int, int, str]] = []
    environments: dict[str, Mapping[str, str]] = {}
    packages: list[str] = []
    started = 0
    missing = failing = ""
    takes = {"ours": 1.0, "A": 2.0, "B": 4.0}

    def __init__(self, environment: Mapping[str, str]) -> None:
        type(self).started += 1
        self._environment = environment
        self._number = self.started
        self.packages.append(environment["PYTHONPATH"].split(os.pathsep)[0])

    def ask(self, do: str, **arguments: Any) -> float:
        if do == "prepare" and arguments["contender"] == self.missing:
            raise MissingError("it is not here")
        if do == "prepare" and arguments["contender"] == self.failing:
            raise RuntimeError("it fills with 2\nand its traceback follows")
        if do == "sample":
            self.asked.append((self._number, arguments["row"], arguments["contender"]))
            self.environments[arguments["contender"]] = self._environment
        return self.takes.get(arguments.get("contender", ""), 0.0)

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _turns(
    monkeypatch: pytest.MonkeyPatch,
    fresh: bool,
    missing: str = "",
    failing: str = "",
    of_a: Mapping[str, str] | None = None,
    compared: Mapping[str, Path] | None = None,
) -> tuple[CaseResult, list[tuple[int, int, str]]]:
    """Run a case of two rows and three rounds, and return it with the turns: process, row and contender."""
    contenders = [
        Contender("ours", lambda: list, ours=True),
        Contender("A", lambda: list, environment=of_a or {}),
        Contender("B", lambda: list, beside=True),
    ]
    rows = [Row(label, contenders, x=3, nbytes=12, environment={"OF_ROWS": "1"}) for label in ("0", "1")]
    case = Case("A case", lambda _: rows, fresh=fresh)
    monkeypatch.setattr(harness, "load", lambda _: dataclasses.replace(case, rounds=3))
    monkeypatch.setattr(harness, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(harness, "Worker", _Recorder)
    monkeypatch.setattr(_Recorder, "asked", [])
    monkeypatch.setattr(_Recorder, "environments", {})
    monkeypatch.setattr(_Recorder, "packages", [])
    monkeypatch.setattr(_Recorder, "started", 0)
    monkeypatch.setattr(_Recorder, "missing", missing)
    monkeypatch.setattr(_Recorder, "failing", failing)
    found = harness.run_case(
        "a_case", compared or {"": Path()}, quick=False, gpu=False, busy=0.25, progress=lambda *_: None
    )
    return found, _Recorder.asked


def test_contenders_take_turns_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found, turns = _turns(monkeypatch, fresh=False)
    # A round to warm up, then three that count: as many as the case allows, since they are short.
    assert turns == [(1, row, who) for row in (0, 1) for _ in range(4) for who in ("ours", "A", "B")]
    assert {each.samples for row in found.rows for each in row.measured.values()} == {3}
    assert [(row.ours, row.beside) for row in found.rows] == [(["ours"], ["B"])] * 2


def test_contenders_take_turns_with_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, turns = _turns(monkeypatch, fresh=True)
    order = [who for _ in range(3) for who in ("ours", "A", "B")]
    assert turns == [(number, row, who) for number, who in enumerate(order, 1) for row in (0, 1)]


@pytest.mark.parametrize("fresh", [True, False])
def test_who_is_missing_is_remarked_and_takes_no_turn(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    found, turns = _turns(monkeypatch, fresh, missing="A")
    assert {who for _, _, who in turns} == {"ours", "B"}
    assert [row.missing for row in found.rows] == [{"A": "it is not here"}] * 2
    assert [list(row.ratios["ours"]) for row in found.rows] == [["B"]] * 2


@pytest.mark.parametrize("fresh", [True, False])
def test_gpuconst_may_be_missing(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    found, _ = _turns(monkeypatch, fresh, missing="ours")
    assert [(row.ours, row.ratios, list(row.measured)) for row in found.rows] == [([], {}, ["A", "B"])] * 2
    assert "Without ours: it is not here." in case_table(found)


@pytest.mark.parametrize("fresh", [True, False])
def test_result_is_what_each_took_and_ours_divided_by_each_peer(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    found, _ = _turns(monkeypatch, fresh)
    assert (found.title, found.busy) == ("A case", 0.25)
    assert [(row.label, row.x, row.nbytes) for row in found.rows] == [("0", 3, 12), ("1", 3, 12)]
    for row in found.rows:
        assert {who: each.median for who, each in row.measured.items()} == _Recorder.takes
        assert {peer: each.median for peer, each in row.ratios["ours"].items()} == {"A": 0.5, "B": 0.25}


@pytest.mark.parametrize("fresh", [True, False])
def test_only_a_peer_may_fail(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    found, turns = _turns(monkeypatch, fresh, failing="A")
    assert {who for _, _, who in turns} == {"ours", "B"}
    assert [row.missing for row in found.rows] == [{"A": "it fills with 2"}] * 2
    with pytest.raises(RuntimeError, match="it fills with 2"):
        _turns(monkeypatch, fresh, failing="ours")


@pytest.mark.parametrize("fresh", [True, False])
def test_each_revision_runs_its_own_package(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    found, turns = _turns(monkeypatch, fresh, compared={"": Path("new"), "HEAD": Path("old")})
    rounds = 3 if fresh else 4  # with one to warm up
    assert [_Recorder.packages[number - 1] for number, row, _ in turns if row == 0] == ["new", "old"] * rounds
    assert [(row.ours, list(row.ratios["ours"])) for row in found.rows] == [(["ours"], ["ours @ HEAD"])] * 2


@pytest.mark.parametrize("fresh", [True, False])
def test_contender_has_the_variables_of_its_row_and_its_own(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    _turns(monkeypatch, fresh, of_a={"OF_A": "2"})
    found = {who: (each.get("OF_ROWS"), each.get("OF_A")) for who, each in _Recorder.environments.items()}
    assert found == {"ours": ("1", None), "A": ("1", "2"), "B": ("1", None)}


def test_a_worker_sees_gpus_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment(Path(), False, {})["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in environment(Path(), True, {})


def test_worker_says_what_failed(tmp_path: Path) -> None:
    tree = trees.snapshot(None, tmp_path / "tree")
    with Worker(environment(tree, False, {})) as worker:
        with pytest.raises(RuntimeError, match=r"^ModuleNotFoundError: .*no_such_case'\n"):
            worker.ask("prepare", case="no_such_case", row=0, contender="", quick=True)
        worker.ask("forget")  # it goes on


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., worker._Worker]]:
    """Return a function that returns a worker, in this process, of a case with one row of given contenders."""

    def started(*contenders: Contender, check: Callable[[Any], None] | None = None) -> worker._Worker:
        case = Case("A case", lambda _: [Row("a row", contenders)], check=check)
        monkeypatch.setattr(worker, "load", lambda _: case)
        return worker._Worker()

    yield started
    gc.unfreeze()


def test_worker_checks_what_a_contender_makes(serve: Callable[..., worker._Worker]) -> None:
    served = serve(Contender("A", lambda: lambda: np.zeros(3, np.float32)), check=check_filled)
    with pytest.raises(AssertionError, match="found 0.0"):
        served.prepare("a_case", 0, "A", quick=True)


def test_sample_is_the_seconds_of_one_of_many_calls(serve: Callable[..., worker._Worker]) -> None:
    lasts, calls = 2e-5, itertools.count()

    def run() -> None:
        end = time.perf_counter() + lasts
        next(calls)
        while time.perf_counter() < end:
            pass

    served = serve(Contender("A", lambda: run), check=lambda _: None)
    served.prepare("a_case", 0, "A", quick=True)
    before = next(calls)
    samples = [served.sample("a_case", 0, "A", quick=True) for _ in range(20)]
    assert lasts <= min(samples) < 2 * lasts
    assert next(calls) - before > 20 * 3


def test_contender_has_its_number_of_threads(serve: Callable[..., worker._Worker]) -> None:
    def make() -> Callable[[], float]:
        prepared = torch.get_num_threads()
        return lambda: prepared * 100 + torch.get_num_threads()

    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    asked = {"all cores": None, "one": 1, "more": cores + 1}
    served = serve(*(Contender(name, make, threads=threads) for name, threads in asked.items()))
    try:
        for name in asked:
            served.prepare("a_case", 0, name, quick=True)
        found = [served.sample("a_case", 0, name, quick=True) for name in asked]
    finally:
        torch.set_num_threads(before)
    assert found == [101 * threads for threads in (cores, 1, cores + 1)]


def test_an_import_that_fails_in_gpuconst_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "gpuconst").mkdir()
    (tmp_path / "gpuconst" / "__init__.py").write_text("import gpuconst.no_such_part")
    with Worker(environment(tmp_path, False, {})) as started, pytest.raises(RuntimeError, match="no_such_part"):
        started.ask("prepare", case="creation", row=0, contender="gpuconst.full", quick=True)


def test_failure_begins_with_what_is_wrong() -> None:
    failed = failure(RuntimeError("\nthere is no compiler\n\nSet VERBOSE=1 for more\n"))
    assert failed["error"].startswith("RuntimeError: there is no compiler\n")


def test_worker_that_ends_says_so(tmp_path: Path) -> None:
    with Worker({**os.environ, "PYTHONPATH": str(tmp_path)}) as worker, pytest.raises(RuntimeError, match="benchmarks"):
        worker.ask("forget")


def test_busy_is_what_was_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_ticks", iter([(100, 400), (130, 500)]).__next__)
    assert machine.busy(0) == 0.7
    monkeypatch.undo()
    before, after = machine._ticks(), machine._ticks()
    if before is None or after is None:
        pytest.skip("only Linux counts ticks")
    assert 0 < before[0] <= after[0] <= after[1]
