"""The results of a run, and the JSON file that stores them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.statistics import Summary


@dataclass
class RowResult:
    """One line of a case, measured.

    Attributes
    ----------
    label, x, nbytes
        As in `contest.Row`.
    measured : dict of str to Summary
        What each contender took, in the case's unit.
    ours : list of str
        The contenders that are gpuconst.
    beside : list of str
        The peers that do less than the row asks for.
    ratios : dict of str to dict of str to Summary
        For each of ours, the ratio ours / peer to each peer.
    missing : dict of str to str
        Why a contender could not take part.
    """

    label: str
    x: float | None = None
    nbytes: int = 0
    measured: dict[str, Summary] = field(default_factory=dict)
    ours: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    ratios: dict[str, dict[str, Summary]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def fastest(self, ours: str) -> str | None:
        """Return the peer with the smallest median among those that do all of the work, None if there is none."""
        rivals = [peer for peer in self.ratios[ours] if peer not in self.beside]
        return min(rivals, key=lambda peer: self.measured[peer].median, default=None)


@dataclass
class CaseResult:
    """A case, measured.

    Attributes
    ----------
    title, unit, axis : str
        As in `contest.Case`.
    busy : float
        Share of the machine that other processes used just before.
    rows : list of RowResult
        In the case's order.
    """

    title: str
    unit: str
    axis: str
    busy: float
    rows: list[RowResult] = field(default_factory=list)

    @property
    def ours(self) -> list[str]:
        """The contenders that are gpuconst, in any row."""
        return list(dict.fromkeys(name for row in self.rows for name in row.ours))

    @property
    def peers(self) -> list[str]:
        """The peers in any row, without those that could not take part."""
        return list(dict.fromkeys(name for row in self.rows for name in row.measured if name not in self.ours))


@dataclass
class Results:
    """A run.

    Attributes
    ----------
    header : dict of str to str
        Machine, versions, method, commit, date and duration.
    cases : dict of str to CaseResult
        Results by the name of the case.
    """

    header: dict[str, str]
    cases: dict[str, CaseResult] = field(default_factory=dict)


def write(results: Results, path: Path) -> None:
    """Write a run as JSON."""
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def read(path: Path) -> Results:
    """Read a run that `write` wrote."""
    found = json.loads(path.read_text())
    results = Results(found["header"])
    for name, case in found["cases"].items():
        rows = [_row(row) for row in case.pop("rows")]
        results.cases[name] = CaseResult(**case, rows=rows)
    return results


def _row(found: dict[str, Any]) -> RowResult:
    measured = {name: Summary(*values) for name, values in found.pop("measured").items()}
    ratios = {
        ours: {peer: Summary(*values) for peer, values in peers.items()} for ours, peers in found.pop("ratios").items()
    }
    return RowResult(**found, measured=measured, ratios=ratios)
