"""The cost of filling many existing torch tensors, each with a value of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from benchmarks.cases.peers import on_threads
from benchmarks.contest import VALUE, Case, Contender, Row

_POISON = -7.0
_VALUES = 100


def values(count: int) -> list[float]:
    """Return a value for each tensor."""
    return [VALUE + index % _VALUES for index in range(count)]


@functools.lru_cache(maxsize=1)
def _tensors(count: int, length: int) -> Any:
    import torch

    return [torch.empty(length) for _ in range(count)]


def poisoned(count: int, length: int) -> Any:
    """Return the tensors that all contenders of a row fill, holding another value."""
    tensors = _tensors(count, length)
    for tensor in tensors:
        tensor.fill_(_POISON)
    return tensors


def check_each(result: Any) -> None:
    """Raise AssertionError unless each tensor has its expected value.

    Parameters
    ----------
    result : tuple
        The tensors, and the expected value of each.
    """
    import torch

    tensors, expected = result
    found = torch.stack([torch.stack((tensor.min(), tensor.max())) for tensor in tensors])
    wanted = torch.tensor(expected, dtype=torch.float32)
    assert torch.equal(found, torch.stack((wanted, wanted), dim=1)), "a tensor was filled with something else"


def fill_many(count: int, length: int) -> Callable[[], Any]:
    """Return a function that fills the tensors in one call."""
    import gpuconst

    tensors, each = poisoned(count, length), values(count)

    def run() -> Any:
        gpuconst.fill_many(tensors, each)
        return tensors, each

    return run


def plan(count: int, length: int) -> Callable[[], Any]:
    """Return a function that fills the tensors by a plan made beforehand."""
    import gpuconst

    tensors, each = poisoned(count, length), values(count)
    planned = gpuconst.plan_fill(tensors, each)

    def run() -> Any:
        planned.fill()
        return tensors, each

    return run


def loop(count: int, length: int) -> Callable[[], Any]:
    """Return a function that fills the tensors one by one."""
    tensors, each = poisoned(count, length), values(count)

    def run() -> Any:
        for tensor, value in zip(tensors, each, strict=True):
            tensor.fill_(value)
        return tensors, each

    return run


def _foreach_zero(count: int, length: int) -> Callable[[], Any]:
    import torch

    tensors, zeros = poisoned(count, length), [0.0] * count

    def run() -> Any:
        torch._foreach_zero_(tensors)
        return tensors, zeros

    return run


def _foreach_zero_add(count: int, length: int) -> Callable[[], Any]:
    import torch

    tensors, each = poisoned(count, length), values(count)

    def run() -> Any:
        torch._foreach_zero_(tensors)
        torch._foreach_add_(tensors, each)
        return tensors, each

    return run


def _foreach_copy(count: int, length: int) -> Callable[[], Any]:
    import torch

    tensors, each = poisoned(count, length), values(count)
    sources = [torch.full((length,), value) for value in each]

    def run() -> Any:
        torch._foreach_copy_(tensors, sources)
        return tensors, each

    return run


_OURS = [Contender("fill_many", fill_many, ours=True), Contender("plan.fill", plan, ours=True)]
_LOOP = Contender("loop of Tensor.fill_", loop)
_FOREACH = [
    Contender("_foreach_zero_ (zeros only)", _foreach_zero, beside=True, threads=1),
    Contender("_foreach_copy_ (from as much memory)", _foreach_copy, threads=1),
    Contender("_foreach_zero_ + _foreach_add_", _foreach_zero_add, threads=1),
]


def _row(count: int, length: int, contenders: list[Contender]) -> Row:
    return Row(f"{count:,} tensors of {length:,} floats", contenders, {"count": count, "length": length})


def rows(quick: bool) -> list[Row]:
    """Return a row for tensors of 768 floats, and in a full run one for matrices of 768 x 768."""
    small = _row(100 if quick else 10_000, 768, [*_OURS, dataclasses.replace(_LOOP, threads=1), *_FOREACH])
    return [small] if quick else [small, _row(100, 768 * 768, [*_OURS, *on_threads(_LOOP), *_FOREACH])]


CASE = Case("Many existing tensors", rows, check=check_each)
