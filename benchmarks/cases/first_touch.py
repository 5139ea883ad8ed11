"""The cost of new arrays that are all kept, as when a model is initialised: their memory is untouched before."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases import peers
from benchmarks.cases.pages import touch_and_free
from benchmarks.cases.peers import KIB, MIB
from benchmarks.contest import Case, Contender, Row
from benchmarks.table import size

_SIZES = {64 * KIB: 4096, MIB: 256, 4 * MIB: 64, 16 * MIB: 16, 64 * MIB: 6, 256 * MIB: 2}
_QUICK_SIZES = {64 * KIB: 64, 4 * MIB: 2}

_kept: list[Any] = []


def keeping(contender: Contender) -> Contender:
    """Return a contender that makes many arrays, keeps them, and returns the seconds per array."""

    def make(nbytes: int, count: int) -> Callable[[], float]:
        full = contender.make(nbytes)
        _kept.append(full())  # work that the library does once, or once per shape, is not a matter of memory

        def measure() -> float:
            touch_and_free(nbytes * count)
            start = time.perf_counter()
            made = [full() for _ in range(count)]
            seconds = time.perf_counter() - start
            peers.check_filled(made[0])
            peers.check_filled(made[-1])
            _kept.extend(made)
            return seconds / count

        return measure

    return dataclasses.replace(contender, make=make)


_CONTENDERS = [keeping(each) for each in (peers.GPUCONST, peers.NUMPY, *peers.TORCH, peers.JAX, peers.TENSORFLOW)]
#: Without TensorFlow, whose import takes as long as everything else.
_QUICK_CONTENDERS = _CONTENDERS[:-1]


def rows(quick: bool) -> list[Row]:
    """Return a row for each size."""
    contenders = _QUICK_CONTENDERS if quick else _CONTENDERS
    return [
        Row(f"{count} x {size(nbytes)}", contenders, {"nbytes": nbytes, "count": count}, x=nbytes, nbytes=nbytes)
        for nbytes, count in (_QUICK_SIZES if quick else _SIZES).items()
    ]


CASE = Case("Create and keep, in a fresh process", rows, axis="bytes", fresh=True, rounds=5)
