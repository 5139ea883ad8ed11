"""The time of a JAX initializer when all arrays are kept, as the parameters of a model are."""

from __future__ import annotations

from benchmarks.cases.first_touch import keeping
from benchmarks.cases.jax_arrays import CONTENDERS
from benchmarks.cases.peers import KIB, MIB
from benchmarks.contest import Case, Row
from benchmarks.table import size

_SIZES = {4 * KIB: 4096, MIB: 256, 4 * MIB: 64, 16 * MIB: 16, 64 * MIB: 6}
_QUICK_SIZES = {4 * KIB: 64, MIB: 16}

_CONTENDERS = [keeping(each) for each in CONTENDERS]
#: Without the others, whose processes would only import JAX once more.
_QUICK_CONTENDERS = _CONTENDERS[:2]


def rows(quick: bool) -> list[Row]:
    """Return a row for each size."""
    contenders = _QUICK_CONTENDERS if quick else _CONTENDERS
    return [
        Row(f"{count} x {size(nbytes)}", contenders, {"nbytes": nbytes, "count": count}, nbytes=nbytes)
        for nbytes, count in (_QUICK_SIZES if quick else _SIZES).items()
    ]


CASE = Case("JAX initializer, create and keep, in a fresh process", rows, fresh=True, rounds=5)
