"""The cost of a new array on a GPU until it can be used, with warm pools (Numba's keeps 256 MiB)."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import Any

from benchmarks.cases.cuda_time import GIB, jax_cuda, need, on_each_backend, torch_cuda, total_seconds
from benchmarks.contest import VALUE, Case, Contender, Row
from benchmarks.table import size

_KIB, _MIB = 2**10, 2**20
_SIZES = [4 * _KIB, 64 * _KIB, _MIB, 16 * _MIB, 256 * _MIB, GIB, 4 * GIB]
_QUICK_SIZES = [4 * _KIB, _MIB]
_NUMBER = 20


def _gpuconst(length: int) -> Callable[[], Any]:
    import gpuconst

    return lambda: gpuconst.full((length,), VALUE, dtype="float32", device="cuda")


def _gpuconst_torch(length: int) -> Callable[[], Any]:
    import gpuconst

    return lambda: gpuconst.full((length,), VALUE, dtype="float32", device="cuda").to_torch()


def _torch(length: int) -> Callable[[], Any]:
    torch = torch_cuda()
    return lambda: torch.full((length,), VALUE, device="cuda")


def _cupy(length: int) -> Callable[[], Any]:
    import cupy

    return lambda: cupy.full((length,), VALUE, "float32")


def _jax(length: int) -> Callable[[], Any]:
    jnp = jax_cuda().numpy
    return lambda: jnp.full((length,), VALUE, "float32")


def _numba(length: int) -> Callable[[], Any]:
    from numba import cuda

    def run() -> Any:
        array = cuda.device_array(length, "float32")
        array[:] = VALUE
        return array

    return run


def _timed(
    maker: Callable[[int], Callable[[], Any]], wait: Callable[[Any], object] | None = None
) -> Callable[[int], Callable[[], float]]:
    """Return a `make` for a contender whose function returns the seconds of a new array.

    Parameters
    ----------
    maker : callable
        Takes the length, and returns the function that makes the array.
    wait : callable, optional
        Waits until an array is filled, instead of waiting for the device.
    """

    def make(nbytes: int) -> Callable[[], float]:
        need(2 * nbytes)
        run = maker(nbytes // 4)
        torch = torch_cuda()
        made = run()
        filled = torch.from_dlpack(made) if hasattr(made, "__dlpack__") else torch.as_tensor(made, device="cuda")
        torch.cuda.synchronize()
        assert bool((filled == VALUE).all()), "wrong contents"
        return lambda: total_seconds(run, _NUMBER, wait)

    return make


_CONTENDERS = [
    *on_each_backend(Contender("full", _timed(_gpuconst), ours=True)),
    *on_each_backend(Contender("full().to_torch()", _timed(_gpuconst_torch), ours=True)),
    Contender("torch.full", _timed(_torch)),
    Contender("cupy.full", _timed(_cupy)),
    Contender("jnp.full", _timed(_jax, methodcaller("block_until_ready"))),
    Contender("numba device_array, d[:] = v", _timed(_numba, lambda array: None)),  # the assignment has waited
]


def rows(quick: bool) -> list[Row]:
    """Return a row for each size."""
    return [
        Row(size(nbytes), _CONTENDERS, {"nbytes": nbytes}, x=nbytes, nbytes=nbytes)
        for nbytes in (_QUICK_SIZES if quick else _SIZES)
    ]


CASE = Case("Create and drop, waited for", rows, axis="bytes", rounds=50)
