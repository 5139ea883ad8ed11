"""How long the device works on a fill, compared with the driver's memset, the ceiling, which comes first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from benchmarks.cases import cuda_fillers
from benchmarks.cases.cuda_memory import DTYPES, LAYOUTS, ROTATED, rotation
from benchmarks.cases.cuda_time import GIB, device_seconds, on_each_backend
from benchmarks.contest import Case, Contender, Row
from benchmarks.table import size

_KIB, _MIB = 2**10, 2**20
#: The ceiling, then float32 from 4 B to 16 GiB.
_SIZES = [
    4 * GIB, 4, 256, 4 * _KIB, 64 * _KIB, _MIB, 4 * _MIB, 16 * _MIB, 64 * _MIB, 256 * _MIB, GIB, 16 * GIB
]  # fmt: skip
_OTHER_SIZES = [64 * _KIB, _MIB, 16 * _MIB, 256 * _MIB, GIB]
_LAYOUT_SIZES = [_MIB, 256 * _MIB]
_QUICK_SIZES = [256 * _MIB, 4]
_FEWEST, _MOST = 20, 200


def _timed(filler: Callable[[Any, float], Callable[[], Any]]) -> Callable[[int, int, str], Callable[[], float]]:
    """Return a `make` for a contender whose function returns the seconds of its fill on the device."""

    def make(nbytes: int, itemsize: int, layout: str) -> Callable[[], float]:
        memory = rotation(nbytes, itemsize, layout)
        memory.check(filler)
        runs = [filler(tensor, memory.value) for tensor in memory.tensors]
        number = min(_MOST, max(_FEWEST, ROTATED // nbytes))
        turns = itertools.cycle(runs)
        return lambda: device_seconds(turns, number)

    return make


_CONTENDERS = [
    *on_each_backend(Contender("fill", _timed(cuda_fillers.gpuconst_fill), ours=True)),
    Contender("cuMemsetAsync", _timed(cuda_fillers.memset)),
    Contender("torch.fill_", _timed(cuda_fillers.torch_fill)),
    Contender("cupy.fill", _timed(cuda_fillers.cupy_fill)),
    Contender("numba d[:] = v (waits)", _timed(cuda_fillers.numba_assign)),
]


def rows(quick: bool) -> list[Row]:
    """Return the rows of float32, then of other itemsizes, then of other layouts."""
    if quick:
        return [_row(nbytes, 4, "aligned") for nbytes in _QUICK_SIZES]
    others = [itemsize for itemsize in DTYPES if itemsize != 4]
    layouts = [layout for layout in LAYOUTS if layout != "aligned"]
    return [
        *(_row(nbytes, 4, "aligned") for nbytes in _SIZES),
        *(_row(nbytes, itemsize, "aligned") for itemsize in others for nbytes in _OTHER_SIZES),
        *(_row(nbytes, itemsize, layout) for layout in layouts for itemsize in DTYPES for nbytes in _LAYOUT_SIZES),
    ]


def _row(nbytes: int, itemsize: int, layout: str) -> Row:
    plotted = itemsize == 4 and layout == "aligned"
    return Row(
        f"{DTYPES[itemsize][0]}, {layout}, {size(nbytes)}",
        # numba's assignment of a scalar supports only contiguous and real arrays.
        _CONTENDERS if layout in ("aligned", "+1") and itemsize < 16 else _CONTENDERS[:-1],
        {"nbytes": nbytes, "itemsize": itemsize, "layout": layout},
        x=nbytes if plotted else None,
        nbytes=nbytes,
    )


CASE = Case("Fill, time on the device", rows, axis="bytes", rounds=50)
