"""What the small parameters of a model cost together: biases and norms, made in a fresh process and kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases.pages import touch_and_free
from benchmarks.cases.peers import ITEMSIZE, check_filled
from benchmarks.contest import VALUE, Case, Contender, Row

#: A layer of a transformer of width 768: two norms, then the biases of attention and feed-forward.
_LAYER = (768, 768, 2304, 768, 768, 768, 3072, 768)

_kept: list[Any] = []

Maker = Callable[[list[int], bool], list[Any]]


def _gpuconst(lengths: list[int], as_torch: bool) -> list[Any]:
    import gpuconst

    specs = {f"parameter.{index}": (length, VALUE, "float32") for index, length in enumerate(lengths)}
    made = gpuconst.full_many(specs, device="cpu")
    return [array.to_torch() for array in made.values()] if as_torch else list(made.values())


def _gpuconst_loop(lengths: list[int], as_torch: bool) -> list[Any]:
    import gpuconst

    full = gpuconst.full
    if as_torch:
        return [full(length, VALUE, dtype="float32", device="cpu").to_torch() for length in lengths]
    return [full(length, VALUE, dtype="float32", device="cpu") for length in lengths]


def _numpy(lengths: list[int], as_torch: bool) -> list[Any]:
    import numpy as np

    if as_torch:
        import torch

        return [torch.from_numpy(np.full(length, VALUE, np.float32)) for length in lengths]
    return [np.full(length, VALUE, np.float32) for length in lengths]


def _torch(lengths: list[int], as_torch: bool) -> list[Any]:
    import torch

    return [torch.full((length,), VALUE, dtype=torch.float32) for length in lengths]


def _measured(maker: Maker) -> Callable[[int, bool], Callable[[], float]]:
    """Return what makes a function that returns the seconds in which a contender made all arrays."""

    def make(count: int, as_torch: bool) -> Callable[[], float]:
        lengths = list(itertools.islice(itertools.cycle(_LAYER), count))
        maker([1], as_torch)  # what the library does only once is in another case

        def measure() -> float:
            touch_and_free(ITEMSIZE * sum(lengths))
            start = time.perf_counter()
            made = maker(lengths, as_torch)
            seconds = time.perf_counter() - start
            assert [array.shape[0] for array in made] == lengths
            for array in made:
                check_filled(array)
            _kept.append(made)
            return seconds

        return measure

    return make


_CONTENDERS = [
    Contender("full_many", _measured(_gpuconst), ours=True),
    Contender("loop of gpuconst.full", _measured(_gpuconst_loop), ours=True),
    Contender("loop of np.full", _measured(_numpy)),
    Contender("loop of torch.full", _measured(_torch), threads=1),
]


def rows(quick: bool) -> list[Row]:
    """Return a row for arrays, and one for torch tensors."""
    count = 100 if quick else 10_000
    return [
        Row(f"{count:,} arrays", _CONTENDERS, {"count": count, "as_torch": False}),
        Row(f"{count:,} arrays, as torch tensors", _CONTENDERS, {"count": count, "as_torch": True}),
    ]


CASE = Case("Many small arrays, in a fresh process", rows, fresh=True, rounds=5)
