"""The cost of all small parameters of a model: biases and norms, made in a fresh process and kept."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases.pages import touch_and_free
from benchmarks.cases.peers import ITEMSIZE
from benchmarks.contest import VALUE, Case, Contender, Row

#: A layer of a transformer of width 768: two norms, then the biases of attention and feed-forward.
_LAYER = (768, 768, 2304, 768, 768, 768, 3072, 768)

#: Number of values where neighbours are to differ: neighbours of one value would be filled as one run.
_VALUES = 100

_kept: list[Any] = []

#: Takes lengths and values by name, and whether to return torch tensors; returns arrays by name.
Maker = Callable[[dict[str, tuple[int, float]], bool], dict[str, Any]]


def _gpuconst(asked: dict[str, tuple[int, float]], as_torch: bool) -> dict[str, Any]:
    import gpuconst

    specs = {name: (length, value, "float32") for name, (length, value) in asked.items()}
    made = gpuconst.full_many(specs, device="cpu")
    return {name: array.to_torch() for name, array in made.items()} if as_torch else made


def _gpuconst_loop(asked: dict[str, tuple[int, float]], as_torch: bool) -> dict[str, Any]:
    import gpuconst

    full = functools.partial(gpuconst.full, dtype="float32", device="cpu")
    if as_torch:
        return {name: full(length, value).to_torch() for name, (length, value) in asked.items()}
    return {name: full(length, value) for name, (length, value) in asked.items()}


def _numpy(asked: dict[str, tuple[int, float]], as_torch: bool) -> dict[str, Any]:
    import numpy as np

    if as_torch:
        import torch

        return {name: torch.from_numpy(np.full(length, value, np.float32)) for name, (length, value) in asked.items()}
    return {name: np.full(length, value, np.float32) for name, (length, value) in asked.items()}


def _torch(asked: dict[str, tuple[int, float]], as_torch: bool) -> dict[str, Any]:
    import torch

    return {name: torch.full((length,), value, dtype=torch.float32) for name, (length, value) in asked.items()}


def _measured(maker: Maker) -> Callable[..., Callable[[], float]]:
    """Return a `make` for a contender whose function returns the seconds to make all arrays."""

    def make(count: int, different: int, as_torch: bool) -> Callable[[], float]:
        asked = {
            f"parameter.{index}": (length, VALUE + index % different)
            for index, length in zip(range(count), itertools.cycle(_LAYER))
        }
        maker({"parameter": (1, VALUE)}, as_torch)  # work that the library does only once is in another case

        def measure() -> float:
            touch_and_free(ITEMSIZE * sum(length for length, _ in asked.values()))
            start = time.perf_counter()
            made = maker(asked, as_torch)
            seconds = time.perf_counter() - start
            _check(made, asked)
            _kept.append(made)
            return seconds

        return measure

    return make


def _check(made: dict[str, Any], asked: dict[str, tuple[int, float]]) -> None:
    """Raise AssertionError unless each name has an array with its length and value."""
    import numpy as np

    assert list(made) == list(asked), "the names differ"
    for array, (length, value) in zip(made.values(), asked.values(), strict=True):
        expected = np.full(length, value, np.float32)
        assert np.array_equal(np.asarray(array), expected), f"found {array}, expected {length} times {value}"


_CONTENDERS = [
    Contender("full_many", _measured(_gpuconst), ours=True),
    Contender("loop of gpuconst.full", _measured(_gpuconst_loop), ours=True),
    Contender("loop of np.full", _measured(_numpy)),
    Contender("loop of torch.full", _measured(_torch), threads=1),
]


def rows(quick: bool) -> list[Row]:
    """Return a row for arrays of one value, one for arrays of many, and one for torch tensors."""
    count = 100 if quick else 10_000
    return [
        Row(label, _CONTENDERS, {"count": count, "different": different, "as_torch": as_torch})
        for label, different, as_torch in [
            (f"{count:,} arrays", 1, False),
            (f"{count:,} arrays of {_VALUES} values in turn", _VALUES, False),
            (f"{count:,} arrays, as torch tensors", 1, True),
        ]
    ]


CASE = Case("Many small arrays, in a fresh process", rows, fresh=True, rounds=5)
