"""Results as tables: Markdown that can also be read in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import CaseResult, Results, RowResult
from benchmarks.statistics import Summary

_UNITS = {"s": (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))}
_BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
#: Above this share of use by other processes, a table says that the machine was busy.
BUSY = 0.1


def size(nbytes: float) -> str:
    """Return a number of bytes with a unit, to three digits."""
    name, unit = next((each for each in _BYTES if nbytes >= each[1]), _BYTES[-1])
    return f"{nbytes / unit:.3g} {name}"


def quantity(value: float, unit: str) -> str:
    """Return a value in a unit of `contest.Case`, to three digits."""
    if unit == "bytes":
        return size(value)
    name, scale = next((each for each in _UNITS[unit] if value >= each[1]), _UNITS[unit][-1])
    return f"{value / scale:.3g} {name}"


def ratio_cell(ratio: Summary) -> str:
    """Return a ratio with its quartiles, in bold if gpuconst is behind."""
    median = _two_digits(ratio.median)
    spread = f" ({_two_digits(ratio.low)}-{_two_digits(ratio.high)})" if ratio.samples > 1 else ""
    return (f"**{median}**" if float(median) > 1 else median) + spread


def _two_digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def header(results: Results) -> str:
    """Return machine, versions, method and run, one line each."""
    return "\n".join(f"- {name}: {text}" for name, text in results.header.items())


def case_table(case: CaseResult) -> str:
    """Return the table of a case: a line for each row and contender of ours, a column for each peer."""
    several = len(case.ours) > 1
    with_speed = case.unit == "s" and any(row.nbytes for row in case.rows)
    columns = ["", *(["gpuconst"] if several else []), case.ours[0] if len(case.ours) == 1 else "took"]
    columns += ["GB/s"] if with_speed else []
    columns += [f"/ {peer}" for peer in case.peers]
    lines = []
    for row in case.rows:
        for ours in row.ours:
            found = row.measured[ours]
            cells = [row.label, *([ours] if several else []), _took(found, row, case.unit)]
            cells += [f"{row.nbytes / found.median / 1e9:.3g}" if row.nbytes else ""] if with_speed else []
            cells += [ratio_cell(row.ratios[ours][peer]) if peer in row.ratios[ours] else "" for peer in case.peers]
            lines.append(cells)
    return "\n".join([markdown(columns, lines), *_remarks(case)])


def _took(found: Summary, row: RowResult, unit: str) -> str:
    text = quantity(found.median, unit)
    if unit == "bytes" and row.nbytes:
        return f"{text}, {found.median / row.nbytes:.2f} x the array"
    return text


def _remarks(case: CaseResult) -> list[str]:
    remarks: dict[str, None] = {}
    for row in case.rows:
        for name, reason in row.missing.items():
            remarks[f"Without {name}: {reason}."] = None
    if case.busy > BUSY:
        remarks[f"Others used {case.busy:.0%} of the machine: these figures are not to be trusted."] = None
    return ["", *remarks] if remarks else []


def summary_table(results: Results) -> str:
    """Return one line per case: the rows where gpuconst is furthest ahead of and behind its fastest peer."""
    lines = []
    for case in results.cases.values():
        duels = [
            (row.ratios[ours][peer], _duel(case, row, ours, peer))
            for row in case.rows
            for ours in row.ours
            if (peer := row.fastest(ours)) is not None
        ]
        if duels:
            best, worst = min(duels, key=_median), max(duels, key=_median)
            ahead = sum(float(f"{ratio.median:.2f}") <= 1 for ratio, _ in duels)
            lines.append([case.title, _best(*best), _best(*worst), f"{ahead} of {len(duels)}"])
    return markdown(["gpuconst / fastest peer", "best row", "worst row", "not behind in"], lines)


def _median(duel: tuple[Summary, str]) -> float:
    return duel[0].median


def _best(ratio: Summary, duel: str) -> str:
    return f"{ratio_cell(ratio).split(' (')[0]} ({duel})"


def _duel(case: CaseResult, row: RowResult, ours: str, peer: str) -> str:
    who = f"{ours}, " if len(case.ours) > 1 else ""
    return f"{who}{row.label}, against {peer}"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(line[index]) for line in [columns, *lines]) for index in range(len(columns))]
    rule = ["-" * max(widths[0], 3), *("-" * (max(width, 3) - 1) + ":" for width in widths[1:])]

    def row(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(max(first[1], 3)), *(cell.rjust(max(width, 3)) for cell, width in others)]
        return f"| {' | '.join(aligned)} |"

    return "\n".join([row(columns), row(rule), *map(row, lines)])


def document(results: Results) -> str:
    """Return the whole document: the header, then the tables of all cases."""
    parts = [header(results)]
    for name, case in results.cases.items():
        parts += [f"{name}: {case.title}", case_table(case)]
    return "\n\n".join(parts)
