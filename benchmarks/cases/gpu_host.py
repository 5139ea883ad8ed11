"""How long a call occupies the host, for work that takes the device next to no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import cuda_fillers
from benchmarks.cases.cuda_time import host_seconds, jax_cuda, on_each_backend, torch_cuda
from benchmarks.contest import VALUE, Case, Contender, Row

_LENGTH = 1024
_NUMBER = 200


def _timed(maker: Callable[[], tuple[Callable[[], Any], Any]]) -> Callable[[], Callable[[], float]]:
    """Return a `make` for a contender whose function returns the seconds of a call on the host.

    Parameters
    ----------
    maker : callable
        Returns the call, and the array that it fills, or None if the call returns that array.
    """

    def make() -> Callable[[], float]:
        torch = torch_cuda()
        run, target = maker()
        returned = run()
        torch.cuda.synchronize()
        filled = torch.from_dlpack(returned if target is None else target)
        assert bool((filled == VALUE).all()), "wrong contents"
        return lambda: host_seconds(run, _NUMBER)

    return make


def _tensor() -> Any:
    return torch_cuda().zeros(_LENGTH, device="cuda")


def _filling(filler: Callable[[Any, float], Callable[[], Any]]) -> Callable[[], Callable[[], float]]:
    def maker() -> tuple[Callable[[], Any], Any]:
        tensor = _tensor()
        return filler(tensor, VALUE), tensor

    return _timed(maker)


def _fill_array() -> tuple[Callable[[], Any], Any]:
    import gpuconst

    array = gpuconst.zeros(_LENGTH, device="cuda")
    return lambda: gpuconst.fill(array, VALUE), array


def _fill_cupy_array() -> tuple[Callable[[], Any], Any]:
    import cupy

    import gpuconst

    array = cupy.zeros(_LENGTH, "float32")
    return lambda: gpuconst.fill(array, VALUE), array


def _gpuconst_full() -> tuple[Callable[[], Any], Any]:
    import gpuconst

    return lambda: gpuconst.full((_LENGTH,), VALUE, dtype="float32", device="cuda"), None


def _torch_full() -> tuple[Callable[[], Any], Any]:
    torch = torch_cuda()
    return lambda: torch.full((_LENGTH,), VALUE, device="cuda"), None


def _cupy_full() -> tuple[Callable[[], Any], Any]:
    import cupy

    return lambda: cupy.full((_LENGTH,), VALUE, "float32"), None


def _jax_full() -> tuple[Callable[[], Any], Any]:
    jnp = jax_cuda().numpy
    return lambda: jnp.full((_LENGTH,), VALUE, "float32"), None


_FILLS = [
    *on_each_backend(Contender("fill(tensor)", _filling(cuda_fillers.gpuconst_fill), ours=True)),
    *on_each_backend(Contender("fill(Array)", _timed(_fill_array), ours=True)),
    *on_each_backend(Contender("fill(cupy array)", _timed(_fill_cupy_array), ours=True)),
    Contender("torch.fill_", _filling(cuda_fillers.torch_fill)),
    Contender("cupy.fill", _filling(cuda_fillers.cupy_fill)),
    Contender("numba d[:] = v (waits)", _filling(cuda_fillers.numba_assign)),
    Contender("cuMemsetD32Async", _filling(cuda_fillers.memset)),
]
_FULLS = [
    *on_each_backend(Contender("full", _timed(_gpuconst_full), ours=True)),
    Contender("torch.full", _timed(_torch_full)),
    Contender("cupy.full", _timed(_cupy_full)),
    Contender("jnp.full", _timed(_jax_full)),
]


def rows(quick: bool) -> list[Row]:
    """Return a row of fills and one of new arrays."""
    return [Row("fill 4 KiB", _FILLS), Row("make 4 KiB", _FULLS)]


CASE = Case("Time on the host of an asynchronous call", rows, rounds=50)
