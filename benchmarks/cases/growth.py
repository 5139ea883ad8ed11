"""The cost per array as their number grows: the total time should grow in proportion, and no faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import many_existing
from benchmarks.contest import Case, Contender, Row

_COUNTS = [1, 10, 100, 1000, 10_000, 100_000, 1_000_000]
_QUICK_COUNTS = [1, 100]
_LENGTH = 16


def _full_many(count: int, length: int) -> Callable[[], Any]:
    import gpuconst

    specs = {str(index): (length, value, "float32") for index, value in enumerate(many_existing.values(count))}
    each = [spec[1] for spec in specs.values()]
    return lambda: (gpuconst.full_many(specs, device="cpu"), each)


def _loop_of_full(count: int, length: int) -> Callable[[], Any]:
    import torch

    each, shape = many_existing.values(count), (length,)
    return lambda: ([torch.full(shape, value) for value in each], each)


def _check(result: Any) -> None:
    """Raise AssertionError unless each array has its value; `full_many` returns them by name."""
    arrays, each = result
    if isinstance(arrays, dict):
        arrays = [array.to_torch() for array in arrays.values()]
    many_existing.check_each((arrays, each))


_CONTENDERS = {
    "new": [
        Contender("full_many", _full_many, ours=True),
        Contender("loop of torch.full", _loop_of_full, threads=1),
    ],
    "existing": [
        Contender("fill_many", many_existing.fill_many, ours=True),
        Contender("plan.fill", many_existing.plan, ours=True),
        Contender("loop of Tensor.fill_", many_existing.loop, threads=1),
    ],
}


def rows(quick: bool) -> list[Row]:
    """Return a row for each number of arrays, of 64 bytes each, new or existing."""
    return [
        Row(f"{count:,} {state}", contenders, {"count": count, "length": _LENGTH}, x=count)
        for state, contenders in _CONTENDERS.items()
        for count in (_QUICK_COUNTS if quick else _COUNTS)
    ]


CASE = Case("Cost as the number of arrays grows", rows, check=_check, axis="arrays", rounds=3)
