"""The cost of filling memory that has been touched before, in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.cases.peers import GIB, ITEMSIZE, KIB, MIB, check_filled, on_threads
from benchmarks.contest import VALUE, Case, Contender, Row
from benchmarks.table import size

_SIZES = [4, KIB, 4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB]
_QUICK_SIZES = [4, MIB]
_POISON = -7.0


@functools.lru_cache(maxsize=1)
def _memory(nbytes: int) -> Any:
    """Return the one array that all contenders of a row fill."""
    import numpy as np

    return np.empty(nbytes // ITEMSIZE, np.float32)


def poisoned(nbytes: int) -> Any:
    """Return that array, full of a value that no contender uses."""
    memory = _memory(nbytes)
    memory[...] = _POISON
    return memory


def _gpuconst(nbytes: int, value: float) -> Callable[[], Any]:
    import gpuconst

    return functools.partial(gpuconst.fill, poisoned(nbytes), value)


def _gpuconst_torch(nbytes: int, value: float) -> Callable[[], Any]:
    import torch

    import gpuconst

    return functools.partial(gpuconst.fill, torch.from_numpy(poisoned(nbytes)), value)


def _numpy(nbytes: int, value: float) -> Callable[[], Any]:
    memory = poisoned(nbytes)

    def run() -> Any:
        memory.fill(value)
        return memory

    return run


def _torch(nbytes: int, value: float) -> Callable[[], Any]:
    import torch

    return functools.partial(torch.from_numpy(poisoned(nbytes)).fill_, value)


def _torch_init(nbytes: int, value: float) -> Callable[[], Any]:
    import torch

    return functools.partial(torch.nn.init.constant_, torch.from_numpy(poisoned(nbytes)), value)


CONTENDERS = [
    Contender("fill(ndarray)", _gpuconst, ours=True),
    Contender("fill(tensor)", _gpuconst_torch, ours=True),
    Contender("ndarray.fill", _numpy),
    *on_threads(Contender("Tensor.fill_", _torch)),
    on_threads(Contender("torch.nn.init.constant_", _torch_init))[-1],
]


def rows(quick: bool) -> list[Row]:
    """Return a row for each size."""
    return [
        Row(size(nbytes), CONTENDERS, {"nbytes": nbytes, "value": VALUE}, x=nbytes, nbytes=nbytes)
        for nbytes in (_QUICK_SIZES if quick else _SIZES)
    ]


CASE = Case("Fill in place", rows, check=check_filled, axis="bytes")
