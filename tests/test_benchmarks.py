"""The benchmarks work, say what they found, and the texts quote that and nothing else. The figures are not tested."""

import dataclasses
import functools
import gc
import itertools
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import cases, harness, machine, report, trees, worker
from benchmarks.cases import cuda_time, fill, first_touch, handover, many_existing, many_new
from benchmarks.cases.cuda_memory import DTYPES, LAYOUTS, Rotation
from benchmarks.cases.peers import TORCH, TORCH_EMPTY, check_filled
from benchmarks.contest import Case, Contender, MissingError, Row
from benchmarks.plot import plot_growth, plot_ratios
from benchmarks.processes import Worker, environment
from benchmarks.results import CaseResult, Results, RowResult, read, write
from benchmarks.statistics import Summary, ratio, summary
from benchmarks.table import BUSY, case_table, document, markdown, quantity, ratio_cell, size, summary_table
from benchmarks.worker import failure


def _row(label: str, x: float, ours: float, numpy: float, torch: float) -> RowResult:
    return RowResult(
        label,
        x=x,
        nbytes=int(x),
        measured={"full": summary([ours] * 3), "np.full": summary([numpy] * 3), "torch.full": summary([torch] * 3)},
        ours=["full"],
        ratios={"full": {"np.full": ratio([ours], [numpy]), "torch.full": ratio([ours], [torch])}},
    )


@pytest.fixture
def results() -> Results:
    rows = [_row("1 KiB", 1024, 2e-6, 1e-6, 4e-6), _row("1 MiB", 2**20, 1e-5, 3e-5, 2e-5)]
    return Results({"machine": "a machine"}, {"creation": CaseResult("Create", "s", "bytes", 0.0, rows)})


# Statistics.


def test_summary_is_median_and_quartiles() -> None:
    assert summary([5, 1, 4, 2, 3]) == Summary(3, 2, 4, 5)
    assert summary([7]) == Summary(7, 7, 7, 1)


def test_ratio_is_taken_round_by_round() -> None:
    # The second round was disturbed for both: of the medians alone the ratio would be 2.
    assert ratio([1, 100, 2], [2, 100, 1]).median == 1
    with pytest.raises(ValueError, match="shorter"):
        ratio([1, 2], [1])


# Tables.


@pytest.mark.parametrize(
    ("nbytes", "text"), [(4, "4 B"), (400, "400 B"), (25 * 1024, "25 KiB"), (2**20, "1 MiB"), (3 * 2**29, "1.5 GiB")]
)
def test_size(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.5, "s", "2.5 s"),
        (1.0, "s", "1 s"),
        (1.234e-3, "s", "1.23 ms"),
        (5e-6, "s", "5 us"),
        (2.1e-8, "s", "21 ns"),
        (2**20, "bytes", "1 MiB"),
    ],
)
def test_quantity(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_ratio_is_bold_where_gpuconst_is_behind() -> None:
    assert ratio_cell(Summary(0.5, 0.4, 0.6, 9)) == "0.50 (0.40-0.60)"
    assert ratio_cell(Summary(1.5, 1.4, 1.6, 9)) == "**1.50** (1.40-1.60)"
    assert ratio_cell(Summary(1.004, 1.004, 1.004, 1)) == "1.00"
    assert ratio_cell(Summary(0.1, 0.1, 0.1, 1)) == "0.10"
    assert ratio_cell(Summary(0.00456, 0.00456, 0.0123, 9)) == "0.0046 (0.0046-0.012)"


def test_markdown_columns_line_up() -> None:
    lines = markdown(["", "took"], [["a row", "1"], ["b", "20"]]).splitlines()
    assert lines == ["|       | took |", "| ----- | ---: |", "| a row |    1 |", "| b     |   20 |"]


def test_table_has_every_row_and_peer_with_losing_ones(results: Results) -> None:
    first, rule, *rows = case_table(results.cases["creation"]).splitlines()
    assert [cell.strip() for cell in first.split("|")[1:-1]] == ["", "full", "GB/s", "/ np.full", "/ torch.full"]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        ["1 KiB", "2 us", "0.512", "**2.00**", "0.50"],
        ["1 MiB", "10 us", "105", "0.33", "0.50"],
    ]


def test_table_says_who_was_missing_and_that_others_were_busy(results: Results) -> None:
    case = results.cases["creation"]
    case.rows[1].missing["cupy.full"] = "No module named 'cupy'"
    case.busy = BUSY * 2
    text = case_table(case)
    assert "Without cupy.full: No module named 'cupy'." in text
    assert "Others used 20% of the machine" in text


def test_memory_is_shown_as_copies_of_the_array() -> None:
    row = RowResult("4 KiB", nbytes=4096, measured={"full": summary([8192.0])}, ours=["full"], ratios={"full": {}})
    assert "8 KiB, 2.00 x the array" in case_table(CaseResult("Memory", "bytes", "", 0.0, [row]))


def test_summary_shows_the_worst_row_too(results: Results) -> None:
    line = summary_table(results).splitlines()[-1]
    assert "0.50 (1 MiB, against torch.full)" in line
    assert "**2.00** (1 KiB, against np.full)" in line
    assert "1 of 2" in line


@pytest.mark.parametrize(("found", "count"), [((1.004, 0.9, 1.1), "1 of 1"), ((1.006, 0.9, 1.1), "0 of 1")])
def test_summary_counts_a_row_as_its_cell_shows_it(
    results: Results, found: tuple[float, float, float], count: str
) -> None:
    (row, _) = results.cases["creation"].rows
    row.ratios["full"] = {"np.full": Summary(*found, 9)}
    results.cases["creation"].rows = [row]
    line = summary_table(results).splitlines()[-1]
    assert count in line
    assert ("**" in line) == (count == "0 of 1")


def test_peer_that_does_less_is_shown_but_is_no_rival(results: Results) -> None:
    row = results.cases["creation"].rows[0]
    assert row.fastest("full") == "np.full"
    row.beside.append("np.full")
    assert row.fastest("full") == "torch.full"
    assert "**2.00**" in case_table(results.cases["creation"])


def test_without_a_rival_nobody_is_fastest(results: Results) -> None:
    case = results.cases["creation"]
    case.rows[0].beside += ["np.full", "torch.full"]
    assert case.rows[0].fastest("full") is None
    assert "1 of 1" in summary_table(results).splitlines()[-1]
    case.rows.pop()
    assert len(summary_table(results).splitlines()) == 2


def test_document_begins_with_the_machine(results: Results) -> None:
    assert document(results).startswith("- machine: a machine\n")


# Files.


def test_results_survive_the_file(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    write(results, path)
    again = read(path)
    write(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert document(again) == document(results)


def test_plots_are_the_same_for_the_same_results(results: Results, tmp_path: Path) -> None:
    for plot in (plot_ratios, plot_growth):
        files = [tmp_path / name for name in ("a.svg", "b.svg")]
        for file in files:
            plot(results, file)
        assert files[0].read_bytes() == files[1].read_bytes()
        assert b"</svg>" in files[0].read_bytes()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the figures that are drawn from now on."""
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    return figures


def test_plots_have_the_medians_by_size(results: Results, drawn: list[Any], tmp_path: Path) -> None:
    rows = results.cases["creation"].rows
    rows.reverse()
    rows[1].measured["np.full"] = Summary(1e-6, 5e-7, 2e-6, 9)
    rows[1].ratios["full"]["np.full"] = Summary(2.0, 0.5, 3.0, 9)
    plot_ratios(results, tmp_path / "ratios.svg")
    plot_growth(results, tmp_path / "growth.svg")
    ratios, growth = (
        {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()} for figure in drawn
    )
    assert ratios["np.full"] == [[1024, 2.0], [2**20, 0.3333]]
    assert ratios["torch.full"] == [[1024, 0.5], [2**20, 0.5]]
    assert growth["np.full"] == [[1024, 1e-6 / 1024], [2**20, 3e-5 / 2**20]]
    assert growth["full"] == [[1024, 2e-6 / 1024], [2**20, 1e-5 / 2**20]]
    assert drawn[0].axes[0].get_ylabel() == "full / peer (below 1: ahead)"


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_ratios(Results({}), tmp_path / "plot.svg")


def test_report_fills_its_places(results: Results, tmp_path: Path) -> None:
    empty = "Before\n<!-- results:cpu/creation -->\n<!-- /results -->\nAfter\n"
    assert report.rendered(empty, tmp_path) == empty
    write(results, tmp_path / "cpu.json")
    filled = report.rendered(empty, tmp_path)
    assert case_table(results.cases["creation"]) in filled
    assert filled.startswith("Before\n")
    assert filled.endswith("\nAfter\n")
    assert report.rendered(filled, tmp_path) == filled
    results.cases["creation"].busy = BUSY * 2
    write(results, tmp_path / "cpu.json")
    filled_again = report.rendered(filled, tmp_path)
    assert case_table(results.cases["creation"]) in filled_again
    assert filled_again.count("| 1 KiB |") == 1
    of_a_later_case = empty.replace("creation", "fill")
    assert report.rendered(of_a_later_case, tmp_path) == of_a_later_case
    with pytest.raises(KeyError):
        report.rendered(empty.replace("creation", "no_such_case"), tmp_path)


def test_report_writes_the_texts_and_says_which_have_changed(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.md"
    text.write_text("<!-- results:cpu/creation -->\n<!-- /results -->\n")
    write(results, tmp_path / "cpu.json")
    for name, value in (("ROOT", tmp_path), ("RESULTS", tmp_path), ("TEXTS", (text,))):
        monkeypatch.setattr(report, name, value)
    report.main()
    report.main()
    assert case_table(results.cases["creation"]) in text.read_text()
    assert capsys.readouterr().err == "text.md: written\ntext.md: unchanged\n"


@pytest.mark.parametrize("path", report.TEXTS, ids=lambda path: str(path.name))
def test_texts_quote_the_results(path: Path) -> None:
    text = path.read_text()
    assert report.rendered(text, report.RESULTS) == text, "run: python -m benchmarks.report"
    assert text.count("<!-- results:") == text.count("<!-- /results -->")


def test_docs_have_a_place_for_each_case() -> None:
    text = (trees.ROOT / "docs" / "benchmarks.md").read_text()
    assert [name for name in ["header", "summary", *cases.CPU] if f"<!-- results:cpu/{name} -->" not in text] == []


# Cases.


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", [*cases.CPU, *cases.GPU])
def test_rows_are_well_formed(name: str, quick: bool) -> None:
    case = cases.load(name)
    rows = case.rows(quick)
    assert [row.label for row in rows] == [row.label for row in case.rows(quick)]
    assert len({row.label for row in rows}) == len(rows)
    for row in rows:
        assert len({each.name for each in row.contenders}) == len(row.contenders)
        assert {each.ours for each in row.contenders} == {True, False}
    if case.axis:
        assert any(row.x for row in rows)


def test_only_contenders_that_check_their_work_are_not_checked() -> None:
    """They return figures of their own: of all arrays that are made, of their memory, or of a whole process."""
    unchecked = {name for name in cases.CPU if cases.load(name).check is None}
    memory = {"memory", "keras_memory"}
    assert unchecked == {"first_touch", "jax_first_touch", "many_new", "torch_modules", "startup"} | memory


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", ["first_touch", "creation", "fill"])
def test_speed_is_that_of_one_array(name: str, quick: bool) -> None:
    for row in cases.load(name).rows(quick):
        assert row.x == row.nbytes == row.arguments["nbytes"]


def _quick(name: str, gpu: bool, folder: Path) -> CaseResult:
    told: list[float] = []
    tree = {"": trees.snapshot(None, folder / "tree")}
    found = harness.run_case(name, tree, quick=True, gpu=gpu, busy=0.0, progress=lambda rows, _: told.append(rows))
    assert sum(told) == pytest.approx(len(found.rows))
    return found


@pytest.mark.parametrize("name", cases.CPU)
def test_case(name: str, tmp_path: Path) -> None:
    found = _quick(name, False, tmp_path)
    rows = cases.load(name).rows(True)
    missing = [reason for measured in found.rows for reason in measured.missing.values()]
    for reason in missing:
        assert "No module named" in reason or "is not installed" in reason, reason
    if missing:
        pytest.skip(missing[0])
    for row, measured in zip(rows, found.rows, strict=True):
        assert list(measured.measured) == [each.name for each in row.contenders]
        assert measured.ours == [each.name for each in row.contenders if each.ours]
        assert all(each.median > 0 for each in measured.measured.values())
        assert all(set(peers) == set(found.peers) & set(measured.measured) for peers in measured.ratios.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.GPU)
def test_gpu_case(name: str, tmp_path: Path) -> None:
    found = _quick(name, True, tmp_path)
    for row, measured in zip(cases.load(name).rows(True), found.rows, strict=True):
        usable = [each.name for each in row.contenders if each.ours and each.name not in measured.missing]
        assert measured.ours == usable != []


def test_check_sees_a_wrong_value_and_dtype() -> None:
    check_filled(np.full(3, 1.1, np.float32))
    for wrong, message in (([1.1, 1.0], "found 1.0 to 1.1"), ([1.2, 1.1], r"found 1\.1\d* to 1\.2")):
        with pytest.raises(AssertionError, match=message):
            check_filled(np.array(wrong, np.float32))
    with pytest.raises(AssertionError, match="float64"):
        check_filled(np.full(3, 1.1))


def test_torch_takes_part_on_one_thread_on_two_and_on_all_cores() -> None:
    cores = max(2, len(os.sched_getaffinity(0)))
    threads = {each.name: each.threads for each in (*TORCH, TORCH_EMPTY)}
    full = {"torch.full, 1 thread": 1, "torch.full, 2 threads": 2, f"torch.full, {cores} threads": cores}
    assert threads == {**full, f"torch.empty().fill_, {cores} threads": cores}


@pytest.mark.needs("jax", "tensorflow")
@pytest.mark.parametrize("name", ["creation", "fill"])
def test_contenders_fill_as_many_bytes_as_the_row_says(name: str) -> None:
    row = cases.load(name).rows(True)[-1]
    filled = {each.name: np.asarray(each.make(**row.arguments)()).nbytes for each in row.contenders}
    assert filled == dict.fromkeys(filled, row.nbytes)


def test_arrays_that_are_kept_are_checked_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_touch, "_kept", [])
    count = 100
    made: list[weakref.ref[np.ndarray]] = []
    wrong: list[int] = []

    def full(nbytes: int) -> np.ndarray:
        array = np.full(nbytes // 4, 2.0 if len(made) in wrong else 1.1, np.float32)
        made.append(weakref.ref(array))
        return array

    contender = first_touch.keeping(Contender("A", lambda nbytes: functools.partial(full, nbytes)))
    measure = contender.make(nbytes=4096, count=count)
    start = time.perf_counter()
    assert 0 < measure() * count <= time.perf_counter() - start
    assert all(array() is not None for array in made)
    wrong += [len(made), len(made) + 2 * count - 1]  # the first of a sample, and the last of another
    for _ in wrong:
        with pytest.raises(AssertionError, match="found 2.0"):
            measure()


def test_check_of_many_sees_a_wrong_one() -> None:
    asked: list[int] = []

    def maker(lengths: dict[str, tuple[int, float]], as_torch: bool) -> dict[str, Any]:
        asked.append(len({value for _, value in lengths.values()}))
        return {name: np.full(length, 1.1, np.float32) for name, (length, _) in lengths.items()}

    many_new._measured(maker)(count=10, different=1, as_torch=False)()
    with pytest.raises(AssertionError, match=r"expected 768 times 2\.1"):
        many_new._measured(maker)(count=10, different=10, as_torch=False)()
    assert asked == [1, 1, 1, 10]


@pytest.mark.parametrize(
    "maker",
    [many_new._gpuconst, many_new._gpuconst_loop, many_new._numpy, many_new._torch],
    ids=lambda m: str(m.__name__),
)
def test_tensors_are_made_where_they_are_asked_for(maker: many_new.Maker) -> None:
    made = maker({"a": (3, 1.5)}, True)["a"]
    assert isinstance(made, torch.Tensor)
    assert made.tolist() == [1.5] * 3


@pytest.mark.needs("jax", "tensorflow")
@pytest.mark.parametrize("step", handover._STEPS)
def test_both_sides_are_handed_over_as_the_same(step: str) -> None:
    ours, theirs = (each.make(step)() for each in handover.CASE.rows(True)[0].contenders)
    assert type(ours) is type(theirs)
    assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)


def test_memory_holds_another_value_before_it_is_filled() -> None:
    for _ in range(2):
        memory = fill.poisoned(64)
        assert (memory == -7.0).all()
        memory.fill(1.1)


def test_check_of_existing_tensors_sees_each_element() -> None:
    assert len(set(many_existing.values(3))) == 3
    tensors = many_existing.poisoned(3, 5)
    assert all((tensor == -7.0).all() for tensor in tensors)
    for tensor, value in zip(tensors, many_existing.values(3), strict=True):
        tensor.fill_(value)
    many_existing.check_each((tensors, many_existing.values(3)))
    for wrong in (-7.0, 700.0):
        tensors[1][4] = wrong
        with pytest.raises(AssertionError, match="filled with something else"):
            many_existing.check_each((tensors, many_existing.values(3)))
    assert all((tensor == -7.0).all() for tensor in many_existing.poisoned(3, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("itemsize", DTYPES)
@pytest.mark.parametrize("nbytes", [16, 64, 4096])
def test_gpu_buffers_hold_what_is_asked(nbytes: int, itemsize: int, layout: str) -> None:
    """The layout is that of torch on any device, so it is checked on the CPU's."""
    memory = Rotation(nbytes, itemsize, layout, device="cpu")
    assert {tensor.numel() * tensor.element_size() for tensor in memory.tensors} == {nbytes}
    memory.check(lambda tensor, value: lambda: tensor.fill_(value))


def test_gpu_check_sees_what_is_missed_and_what_is_touched_beside() -> None:
    memory = Rotation(64, 4, "+1", device="cpu")

    def too_short(tensor: torch.Tensor, value: float) -> Callable[[], Any]:
        return lambda: tensor[:-1].fill_(value)

    def too_long(tensor: torch.Tensor, value: float) -> Callable[[], Any]:
        return lambda: tensor.as_strided((17,), (1,)).fill_(value)

    for filler, message in ((too_short, "an element was missed"), (too_long, "a byte beside them was written")):
        with pytest.raises(AssertionError, match=message):
            memory.check(filler)


class _IdleEvent:
    """An event of a device that has done everything before it is asked."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_IdleEvent") -> float:
        return 6.0


def test_gpu_time_taken_again_is_that_of_other_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    cuda = SimpleNamespace(Event=_IdleEvent, synchronize=lambda: None, _sleep=slept.append)
    monkeypatch.setattr(cuda_time, "torch_cuda", lambda: SimpleNamespace(cuda=cuda))
    filled: list[int] = []
    buffers = itertools.cycle([functools.partial(filled.append, number) for number in range(100)])
    assert cuda_time.device_seconds(buffers, 3) == pytest.approx(0.002)
    assert filled == [0, 1, 2, 3, 4, 5]
    assert slept == [3 * cycles for cycles in cuda_time._CYCLES_A_CALL]


def test_gpu_time_of_a_call_waits_for_the_device_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lasts, number = 0.001, 20
    pause = functools.partial(time.sleep, lasts)
    cuda = SimpleNamespace(synchronize=pause)
    monkeypatch.setattr(cuda_time, "torch_cuda", lambda: SimpleNamespace(cuda=cuda))
    assert lasts <= cuda_time.total_seconds(list, number) < number * lasts
    assert lasts <= cuda_time.total_seconds(list, number, wait=lambda _: pause()) < number * lasts
    assert lasts <= cuda_time.host_seconds(pause, number) < number * lasts
    assert cuda_time.host_seconds(list, number) < lasts


def test_gpu_contenders_need_room_and_name_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(mem_get_info=lambda: (200, 1000))
    monkeypatch.setattr(cuda_time, "torch_cuda", lambda: SimpleNamespace(cuda=cuda))
    cuda_time.need(100)
    with pytest.raises(MissingError, match="are free on the card"):
        cuda_time.need(101)
    both = cuda_time.on_each_backend(Contender("fill", lambda: list, ours=True))
    assert {each.name: each.environment for each in both} == {
        f"fill, {backend}": {"GPUCONST_BACKEND": backend} for backend in ("cupy", "numba")
    }


# The harness.


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
    samples = [served.sample("a_case", 0, "A", quick=True) for _ in range(5)]
    assert lasts <= min(samples) < 2 * lasts
    assert next(calls) - before > 5 * 3


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


# The command line.


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=trees.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_writes_json_and_plots_and_prints_the_table(tmp_path: Path) -> None:
    done = _run("fill", "--quick", "--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == document(read(tmp_path / "run.json"))
    assert "quick, not for quoting" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.svg", "run-growth.svg"}


def test_command_compares_with_a_revision(tmp_path: Path) -> None:
    if trees.commit() == "unknown":
        pytest.skip("this is no git checkout, so there is no revision to compare with")
    done = _run("many_existing", "--quick", "--against", "HEAD", "--json", str(tmp_path / "run.json"))
    assert done.returncode == 0, done.stderr
    (row,) = read(tmp_path / "run.json").cases["many_existing"].rows
    assert {ours: list(peers) for ours, peers in row.ratios.items()} == {
        "fill_many": ["fill_many @ HEAD"],
        "plan.fill": ["plan.fill @ HEAD"],
    }


def test_a_revision_needs_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="git is not installed"):
        trees.snapshot("HEAD", tmp_path / "tree")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["no_such_case"], 2, "the cases of the CPU are first_touch"),
        (["gpu_device"], 2, "no case gpu_device"),
        (["fill", "--against", "no-such-revision"], 2, "'no-such-revision'"),
        (["--gpu"], 1, "--gpu needs a GPU, and there is none to use: cupy: "),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], status: int, message: str) -> None:
    done = _run(*arguments)
    assert done.returncode == status
    assert message in " ".join(done.stderr.split())


def test_gpu_contenders_without_a_gpu_say_why(tmp_path: Path) -> None:
    tree = trees.snapshot(None, tmp_path / "tree")
    for name in cases.GPU:
        for contender in cases.load(name).rows(True)[0].contenders:
            if contender.ours:
                with (
                    Worker(environment(tree, False, contender.environment)) as worker,
                    pytest.raises(MissingError, match="CUDA"),
                ):
                    worker.ask("prepare", case=name, row=0, contender=contender.name, quick=True)
                break
