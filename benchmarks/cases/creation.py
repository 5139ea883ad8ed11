"""The cost of a new array that is dropped at once, so that its memory is reused."""

from __future__ import annotations

from benchmarks.cases import peers
from benchmarks.cases.peers import GIB, KIB, MIB
from benchmarks.contest import Case, Row
from benchmarks.table import size

_SIZES = [4, 400, 4 * KIB, 25 * KIB, 64 * KIB, 512 * KIB, MIB, 4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB, 256 * MIB, GIB]
_QUICK_SIZES = [4, 64 * KIB, 4 * MIB]
_CONTENDERS = [
    peers.GPUCONST,
    peers.NUMPY,
    *peers.TORCH,
    peers.TORCH_EMPTY,
    peers.JAX,
    peers.JAX_JITTED,
    peers.TENSORFLOW,
]


def rows(quick: bool) -> list[Row]:
    """Return a row for each size."""
    return [
        Row(size(nbytes), _CONTENDERS, {"nbytes": nbytes}, x=nbytes, nbytes=nbytes)
        for nbytes in (_QUICK_SIZES if quick else _SIZES)
    ]


CASE = Case("Create and drop", rows, check=peers.check_filled, axis="bytes")
