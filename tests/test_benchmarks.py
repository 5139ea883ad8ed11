"""What the benchmarks found is shown as it is, and the texts quote nothing else. The figures are not tested."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, report, trees
from benchmarks.contest import MissingError
from benchmarks.plot import plot_growth, plot_ratios
from benchmarks.processes import Worker, environment
from benchmarks.results import CaseResult, Results, RowResult, read, write
from benchmarks.statistics import Summary, ratio, summary
from benchmarks.table import BUSY, case_table, document, markdown, quantity, ratio_cell, size, summary_table


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
