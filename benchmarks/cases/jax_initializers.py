"""The time of a JAX initializer when the array is dropped at once, so that its memory is reused."""

from __future__ import annotations

from benchmarks.cases.jax_arrays import CONTENDERS
from benchmarks.cases.peers import KIB, MIB, check_filled
from benchmarks.contest import Case, Row
from benchmarks.table import size

_SIZES = [4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
_QUICK_SIZES = [4 * KIB, MIB]


def rows(quick: bool) -> list[Row]:
    """Return a row for each size."""
    return [
        Row(size(nbytes), CONTENDERS, {"nbytes": nbytes}, nbytes=nbytes)
        for nbytes in (_QUICK_SIZES if quick else _SIZES)
    ]


CASE = Case("JAX initializer, create and drop", rows, check=check_filled)
