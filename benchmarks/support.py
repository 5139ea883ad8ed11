"""Which framework takes which dtype without a copy, found by handing arrays over; prints a Markdown table.

``python -m benchmarks.support --write`` puts the table into the README, between its marks.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import gpuconst
from gpuconst.dtypes import DTYPES

README = Path(__file__).parents[1] / "README.md"
MARKS = re.compile(r"(?<=<!-- support -->\n).*?(?=<!-- /support -->)", re.DOTALL)

#: Column headings, and the method of `Array` behind each.
FRAMEWORKS = {"NumPy": "to_numpy", "torch": "to_torch", "JAX": "to_jax", "TensorFlow": "to_tensorflow"}


def outcome(dtype: str, method: str) -> str:
    """Hand one array over, and say whether its memory was shared."""
    array = gpuconst.full((2, 3), 1, dtype=dtype, device="cpu")
    try:
        taken = getattr(array, method)()
    except (TypeError, BufferError):
        return "refused"
    return "zero-copy" if gpuconst.shares_memory(taken, array) else "copied"


def table() -> str:
    """Return the table: a row for each set of outcomes, with the dtypes that have it."""
    import jax

    with jax.enable_x64(True):
        rows: dict[tuple[str, ...], list[str]] = {}
        for dtype in DTYPES:
            rows.setdefault(tuple(outcome(dtype, method) for method in FRAMEWORKS.values()), []).append(dtype)
    lines = [f"| dtype | {' | '.join(FRAMEWORKS)} |", f"|---|{'---|' * len(FRAMEWORKS)}"]
    lines += [f"| {', '.join(dtypes)} | {' | '.join(outcomes)} |" for outcomes, dtypes in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    if parser.parse_args().write:
        text = README.read_text()
        made = table()
        README.write_text(MARKS.sub(lambda _: made, text))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
