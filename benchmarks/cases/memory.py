"""The peak memory of making arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.cases import peers
from benchmarks.cases.pages import peak
from benchmarks.cases.peers import GIB, KIB, MIB
from benchmarks.contest import Case, Contender, Row
from benchmarks.table import size

_SIZES = {4 * KIB: 16384, 64 * KIB: 1024, MIB: 64, 16 * MIB: 4, 256 * MIB: 1, GIB: 1}
_QUICK_SIZES = {64 * KIB: 64, 16 * MIB: 1}

_kept: list[Any] = []


def _weighed(contender: Contender) -> Contender:
    """Return a contender that makes arrays, keeps them, and returns the bytes taken at the peak."""

    def make(nbytes: int, count: int) -> Callable[[], float]:
        full = contender.make(nbytes)
        _kept.append(full())  # memory that the library takes for itself, once or once per shape, does not count

        def measure() -> float:
            made, most = peak(lambda: [full() for _ in range(count)])
            peers.check_filled(made[-1])
            _kept.extend(made)
            return most

        return measure

    return dataclasses.replace(contender, make=make)


_CONTENDERS = [_weighed(each) for each in (peers.GPUCONST, peers.NUMPY, *peers.TORCH[:1], peers.JAX, peers.TENSORFLOW)]
#: Without TensorFlow, whose import takes as long as everything else.
_QUICK_CONTENDERS = _CONTENDERS[:-1]


def rows(quick: bool) -> list[Row]:
    """Return a row for each size, with as many arrays as make 64 MiB or more."""
    contenders = _QUICK_CONTENDERS if quick else _CONTENDERS
    return [
        Row(
            f"{count} x {size(nbytes)}",
            contenders,
            {"nbytes": nbytes, "count": count},
            x=nbytes,
            nbytes=nbytes * count,
        )
        for nbytes, count in (_QUICK_SIZES if quick else _SIZES).items()
    ]


CASE = Case("Peak memory", rows, unit="bytes", axis="bytes", fresh=True, rounds=2)
