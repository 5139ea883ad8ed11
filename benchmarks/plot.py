"""Results as plots: ratios against size, and cost as the work grows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import CaseResult, Results, RowResult
from benchmarks.table import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Size of a panel in inches: three columns are as wide as a README is shown.
_PANEL = 3.3, 3.3
_ONE = {"bytes": "a byte", "arrays": "an array"}
_STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "gpuconst",
    "figure.facecolor": "white",
}


def plot_ratios(results: Results, path: Path) -> None:
    """Draw ours / peer against size, with one panel per case and one line per peer.

    Parameters
    ----------
    results : Results
        Results of any run; cases without a size are left out.
    path : Path
        File to write; its suffix determines the format.

    Raises
    ------
    ValueError
        If no case has a size.
    """
    cases = [case for case in results.cases.values() if case.axis == "bytes" and case.unit == "s"]
    _draw(cases, _ratio_panel, path)


def plot_growth(results: Results, path: Path) -> None:
    """Draw time or memory per byte, or time per array, against their number; one line per contender."""
    _draw([case for case in results.cases.values() if case.axis], _growth_panel, path)


def _draw(
    cases: list[CaseResult], panel: Callable[[Axes, CaseResult, dict[str, dict[str, Any]]], None], path: Path
) -> None:
    if not cases:
        raise ValueError("there is nothing to plot: none of these cases has a size")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(_PANEL[0] * columns, _PANEL[1] * rows), squeeze=False, layout="constrained"
        )
        styles = _styles(cases)
        for place in axes.flat[len(cases) :]:
            place.set_axis_off()
        for place, case in zip(axes.flat, cases, strict=False):
            place.set_title(case.title, fontsize=9)
            place.set_xscale("log", base=2 if case.axis == "bytes" else 10)
            if case.unit == "s":
                place.set_yscale("log")
            panel(place, case, styles)
            if case.axis == "bytes":
                place.xaxis.set_major_formatter(lambda value, _: size(value))
            else:
                place.set_xlabel(case.axis)
            place.tick_params(axis="x", labelrotation=30)
        lines = {line.get_label(): line for place in axes.flat for line in place.get_lines()}
        named = {name: line for name, line in lines.items() if name in styles}
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, handlelength=4)
        # No date, so that the same results give the same file.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        pyplot.close(figure)


def _styles(cases: list[CaseResult]) -> dict[str, dict[str, Any]]:
    """Return the style of each contender, the same in all panels: peers in colours, gpuconst black and thick."""
    peers = dict.fromkeys(peer for case in cases for peer in case.peers)
    ours = dict.fromkeys(name for case in cases for name in case.ours)
    dashes = ("-", "--", ":", "-.")
    return {
        **{
            peer: {"color": f"C{index % 10}", "linestyle": dashes[index // 10], "linewidth": 1}
            for index, peer in enumerate(peers)
        },
        **{
            name: {"color": "black", "linestyle": dashes[index % len(dashes)], "linewidth": 1.8}
            for index, name in enumerate(ours)
        },
    }


def _points(case: CaseResult, holds: Callable[[RowResult], bool]) -> list[RowResult]:
    return sorted((row for row in case.rows if row.x is not None and holds(row)), key=lambda row: row.x or 0)


def _ratio_panel(axes: Axes, case: CaseResult, styles: dict[str, dict[str, Any]]) -> None:
    ours = case.ours[0]
    for peer in case.peers:
        rows = _points(case, lambda row, peer=peer: peer in row.ratios.get(ours, {}))  # type: ignore[misc]
        if rows:
            ratios = [row.ratios[ours][peer] for row in rows]
            xs = [row.x for row in rows if row.x is not None]
            axes.plot(xs, [ratio.median for ratio in ratios], marker=".", label=peer, **styles[peer])
            low, high = [ratio.low for ratio in ratios], [ratio.high for ratio in ratios]
            axes.fill_between(xs, low, high, alpha=0.15, color=styles[peer]["color"])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel(f"{ours} / peer (below 1: ahead)")
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")


def _growth_panel(axes: Axes, case: CaseResult, styles: dict[str, dict[str, Any]]) -> None:
    for name in [*case.peers, *case.ours]:
        rows = _points(case, lambda row, name=name: name in row.measured)  # type: ignore[misc]
        if rows:
            xs = [row.x for row in rows if row.x is not None]
            per = [row.nbytes for row in rows] if case.unit == "bytes" else xs
            costs = [row.measured[name].median / count for row, count in zip(rows, per, strict=True)]
            axes.plot(xs, costs, marker=".", label=name, **styles[name])
    axes.set_ylabel("bytes at the peak for a byte" if case.unit == "bytes" else f"seconds for {_ONE[case.axis]}")
