"""The cost of filling many tensors on a GPU, each with a value of its own, until all are filled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases.cuda_time import need, on_each_backend, torch_cuda, total_seconds
from benchmarks.cases.many_existing import values
from benchmarks.contest import Case, Contender, MissingError, Row

_POISON = -7.0
#: Minimum number of tensors that one sample fills.
_FILLED = 3000
#: Maximum number of tensors given to torch.compile, which takes a minute for so many.
_MOST_COMPILED = 1000

Maker = Callable[[list[Any], list[float]], Callable[[], Any]]


def _fill_many(tensors: list[Any], each: list[float]) -> Callable[[], Any]:
    import gpuconst

    return lambda: gpuconst.fill_many(tensors, each)


def _plan(tensors: list[Any], each: list[float]) -> Callable[[], Any]:
    import gpuconst

    run: Callable[[], Any] = gpuconst.plan_fill(tensors, each).fill
    return run


def _loop(tensors: list[Any], each: list[float]) -> Callable[[], Any]:
    def run() -> None:
        for tensor, value in zip(tensors, each, strict=True):
            tensor.fill_(value)

    return run


def _foreach_zero(tensors: list[Any], each: list[float]) -> Callable[[], Any]:
    torch = torch_cuda()
    return lambda: torch._foreach_zero_(tensors)


def _foreach_zero_add(tensors: list[Any], each: list[float]) -> Callable[[], Any]:
    torch = torch_cuda()

    def run() -> None:
        torch._foreach_zero_(tensors)
        torch._foreach_add_(tensors, each)

    return run


def _foreach_copy(tensors: list[Any], each: list[float]) -> Callable[[], Any]:
    torch = torch_cuda()
    sources = [torch.full_like(tensor, value) for tensor, value in zip(tensors, each, strict=True)]
    return lambda: torch._foreach_copy_(tensors, sources)


def _graphed(maker: Maker) -> Maker:
    """Return a maker that captures the launches once and replays them; a graph keeps nothing alive that it uses."""

    def make(tensors: list[Any], each: list[float]) -> Callable[[], Any]:
        torch = torch_cuda()
        run = maker(tensors, each)
        run()  # compiling and loading, at the first call, cannot be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return lambda: (graph.replay(), run, tensors)

    return make


def _compiled(tensors: list[Any], each: list[float]) -> Callable[[], Any]:
    if len(tensors) > _MOST_COMPILED:
        raise MissingError(f"torch.compile takes minutes for more than {_MOST_COMPILED} tensors")
    run: Callable[[], Any] = torch_cuda().compile(_loop(tensors, each))
    return run


def _timed(maker: Maker, zeros: bool = False) -> Callable[[int, int], Callable[[], float]]:
    """Return a `make` for a contender whose function returns the seconds until all tensors are filled."""

    def make(count: int, length: int) -> Callable[[], float]:
        need(4 * count * length)
        torch = torch_cuda()
        each = values(count)
        tensors = [torch.full((length,), _POISON, device="cuda") for _ in range(count)]
        run = maker(tensors, each)
        torch._foreach_mul_(tensors, 0.5)  # undoes anything that the preparation has filled
        run()
        torch.cuda.synchronize()
        wanted = torch.tensor([0.0] * count if zeros else each, device="cuda")
        assert torch.equal(torch.stack(tensors), wanted[:, None].expand(count, length)), "wrong contents"
        return lambda: total_seconds(run, -(-_FILLED // count))

    return make


_CONTENDERS = [
    *on_each_backend(Contender("fill_many", _timed(_fill_many), ours=True)),
    *on_each_backend(Contender("plan.fill", _timed(_plan), ours=True)),
    *on_each_backend(Contender("plan.fill in a graph", _timed(_graphed(_plan)), ours=True)),
    Contender("loop of fill_", _timed(_loop)),
    Contender("loop of fill_ in a graph", _timed(_graphed(_loop))),
    Contender("loop of fill_, compiled", _timed(_compiled)),
    Contender("_foreach_zero_ (zeros only)", _timed(_foreach_zero, zeros=True), beside=True),
    Contender("_foreach_zero_ + _foreach_add_", _timed(_foreach_zero_add)),
    Contender("_foreach_copy_ (from as much memory)", _timed(_foreach_copy)),
]


def rows(quick: bool) -> list[Row]:
    """Return a row for a thousand tensors, and one for a hundred thousand."""
    counts = {100: 1024} if quick else {1000: 1024, 100_000: 64}
    return [
        Row(
            f"{count:,} tensors of {length} floats",
            _CONTENDERS,
            {"count": count, "length": length},
            nbytes=4 * count * length,
        )
        for count, length in counts.items()
    ]


CASE = Case("Many existing tensors, waited for", rows, rounds=50)
