"""The cost of making a weight of a Keras model."""

from __future__ import annotations

from benchmarks.cases.keras_variables import BACKENDS, CONTENDERS, check_weight
from benchmarks.cases.peers import KIB, MIB
from benchmarks.contest import Case, Row
from benchmarks.table import size

_SIZES = [4 * KIB, MIB, 64 * MIB, 512 * MIB]
_QUICK_SIZES = [MIB]


def rows(quick: bool) -> list[Row]:
    """Return a row for each backend and size."""
    return [
        Row(
            f"{backend}, {size(nbytes)}",
            CONTENDERS,
            {"nbytes": nbytes},
            nbytes=nbytes,
            environment={"KERAS_BACKEND": backend},
        )
        for backend in BACKENDS
        for nbytes in (_QUICK_SIZES if quick else _SIZES)
    ]


CASE = Case("Keras weight", rows, check=check_weight)
