"""The peak memory of making a weight of a Keras model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.cases.keras_variables import BACKENDS, CONTENDERS, check_weight
from benchmarks.cases.pages import peak
from benchmarks.cases.peers import KIB, MIB
from benchmarks.contest import Case, Contender, Row
from benchmarks.table import size

_SIZES = [64 * MIB, 512 * MIB]
_QUICK_SIZES = [16 * MIB]
#: The backend that imports fastest.
_QUICK_BACKENDS = BACKENDS[:1]

_kept: list[Any] = []


def _weighed(contender: Contender) -> Contender:
    """Return a contender that makes a weight, keeps it, and returns the bytes taken at the peak."""

    def make(nbytes: int) -> Callable[[], float]:
        run = contender.make(nbytes)
        contender.make(4 * KIB)()  # memory that Keras and its backend take for themselves does not count

        def measure() -> float:
            made, most = peak(run)
            check_weight(made)
            _kept.append(made)
            return most

        return measure

    return dataclasses.replace(contender, make=make)


_CONTENDERS = [_weighed(each) for each in CONTENDERS]


def rows(quick: bool) -> list[Row]:
    """Return a row for each backend and size."""
    return [
        Row(
            f"{backend}, {size(nbytes)}",
            _CONTENDERS,
            {"nbytes": nbytes},
            nbytes=nbytes,
            environment={"KERAS_BACKEND": backend},
        )
        for backend in (_QUICK_BACKENDS if quick else BACKENDS)
        for nbytes in (_QUICK_SIZES if quick else _SIZES)
    ]


CASE = Case("Peak memory of a Keras weight", rows, unit="bytes", fresh=True, rounds=1)
