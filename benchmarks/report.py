"""Writes results into the texts that quote them; run as ``python -m benchmarks.report``.

A text has a place for a table between ``<!-- results:FILE/NAME -->`` and ``<!-- /results -->``, where FILE
is the stem of a file in ``benchmarks/results/`` and NAME a case, ``header`` or ``summary``. The place
stays empty as long as there is no such file, or the file does not have the case.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks import cases
from benchmarks.results import read
from benchmarks.table import case_table, header, summary_table
from benchmarks.trees import ROOT

RESULTS = ROOT / "benchmarks" / "results"
TEXTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")

_PLACE = re.compile(r"(<!-- results:([\w.-]+)/(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
_WHOLE_RUN = {"header": header, "summary": summary_table}


def rendered(text: str, folder: Path) -> str:
    """Return a text with its places filled from the results in a folder.

    Raises
    ------
    KeyError
        If a place names a case that does not exist.
    """

    def table(place: re.Match[str]) -> str:
        start, file, name, end = place.groups()
        path = folder / f"{file}.json"
        if not path.exists():
            return start + end
        results = read(path)
        if name in (*cases.CPU, *cases.GPU) and name not in results.cases:
            return start + end
        whole = _WHOLE_RUN.get(name)
        return f"{start}\n{whole(results) if whole else case_table(results.cases[name])}\n\n{end}"

    return _PLACE.sub(table, text)


def main() -> None:
    """Write all texts, and say which have changed."""
    for path in TEXTS:
        before = path.read_text()
        after = rendered(before, RESULTS)
        path.write_text(after)
        print(f"{path.relative_to(ROOT)}: {'unchanged' if before == after else 'written'}", file=sys.stderr)


if __name__ == "__main__":
    main()
