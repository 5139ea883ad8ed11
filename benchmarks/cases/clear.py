"""The cost of filling memory that has been touched before, in place, with zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.cases.fill import CONTENDERS, poisoned
from benchmarks.cases.peers import GIB, MIB, check_filled, on_threads
from benchmarks.contest import Case, Contender, Row
from benchmarks.table import size

_SIZES = [64 * MIB, 256 * MIB, GIB]
_QUICK_SIZES = [64 * MIB]


def _torch_zero(nbytes: int, value: float) -> Callable[[], Any]:
    import torch

    return torch.from_numpy(poisoned(nbytes)).zero_


_CLEARING = [
    *CONTENDERS,
    *on_threads(Contender("Tensor.zero_", _torch_zero)),
]


def rows(quick: bool) -> list[Row]:
    """Return a row for each size."""
    return [
        Row(size(nbytes), _CLEARING, {"nbytes": nbytes, "value": 0.0}, nbytes=nbytes)
        for nbytes in (_QUICK_SIZES if quick else _SIZES)
    ]


CASE = Case("Fill in place, with zeros", rows, check=functools.partial(check_filled, value=0.0))
