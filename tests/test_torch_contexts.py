"""Filling where torch does not simply run: tensors without memory, graphs, modes, and shards in several processes."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gpuconst

# Tensors without memory.


def test_fake_tensors_are_not_handed_out() -> None:
    with FakeTensorMode(), pytest.raises(BufferError, match="fake tensors here, which have no memory"):
        gpuconst.full(3, 1.0, device="cpu").to_torch()


def test_a_tensor_that_torch_traces_and_so_copies_is_not_handed_out() -> None:
    with pytest.raises(BufferError, match="torch copied the array .*; while it traces, use torch.full; "):
        make_fx(lambda x: x + gpuconst.full(3, 1.0, device="cpu").to_torch())(torch.ones(3))


def test_memory_of_before_is_filled_while_new_tensors_are_fake() -> None:
    x = torch.zeros(3)
    with FakeTensorMode():
        gpuconst.fill(x, 5.0)
    assert x.tolist() == [5, 5, 5]


# torch.compile: the graph breaks at a fill, and the fill happens.


def filled(x: torch.Tensor, value: Any) -> torch.Tensor:
    y = x * 2
    gpuconst.fill(y, value)
    return y + 1


def many_filled(x: torch.Tensor, value: Any) -> torch.Tensor:
    y, z = x * 2, x * 3
    gpuconst.fill_many([y, z], [value, 10])
    return y + z - 9


def many_filled_from_a_generator(x: torch.Tensor, value: Any) -> torch.Tensor:
    ys = [x * 2, x * 3]
    gpuconst.fill_many((y for y in ys), value)
    return ys[0] + 1


def planned(x: torch.Tensor, value: Any) -> torch.Tensor:
    y = x * 2
    gpuconst.plan_fill([y], value).fill()
    return y + 1


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("function", [filled, many_filled, many_filled_from_a_generator, planned])
def test_a_compiled_function_gives_what_it_gives_uncompiled(function: Callable[..., torch.Tensor]) -> None:
    compiled = torch.compile(function, backend="aot_eager")
    for length in (3, 4, 5):
        x = torch.ones(length)
        assert torch.equal(compiled(x, 5.0), torch.full((length,), 6.0))
        assert (x == 1).all()
    with pytest.raises(OverflowError):
        compiled(torch.ones(3, dtype=torch.int8), 300)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_plan_of_before_is_filled_by_a_compiled_function() -> None:
    x = torch.ones(3)
    plan = gpuconst.plan_fill([x], 5.0)

    def function(y: torch.Tensor) -> torch.Tensor:
        z = y * 2
        plan.fill()
        return z + y

    assert torch.compile(function, backend="aot_eager")(x).tolist() == [7, 7, 7]


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_values_are_raw_bits_too() -> None:
    compiled = torch.compile(filled, backend="aot_eager")
    assert compiled(torch.ones(3), b"\x00\x00\xa0\x40").tolist() == [6, 6, 6]


def test_there_is_one_break_and_nothing_of_ours_is_read(run_python: Callable[..., str]) -> None:
    code = """
        import torch, gpuconst
        from torch._dynamo.utils import counters, get_compilation_metrics

        def function(x):
            y = x * 2
            gpuconst.fill(y, 5.0)
            return y + 1

        print(torch.compile(function, backend="eager")(torch.ones(3)).tolist())
        print(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
        print([read.co_name.split("_in_")[-1].split("_at_")[0] for read in get_compilation_metrics()])
    """
    assert run_python(code).splitlines() == ["[6.0, 6.0, 6.0]", "2 1", "['function', 'function']"]


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_whole_graph_is_refused_by_torch() -> None:
    compiled = torch.compile(filled, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(torch.ones(3), 5.0)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look at it
def test_a_compiled_fill_is_seen_by_autograd() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        saved = x * 1
        result = (saved * saved).sum()
        with torch.no_grad():
            gpuconst.fill(saved, 5.0)
        return result

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.compile(function, backend="eager")(x).backward()  # type: ignore[no-untyped-call]


# Graphs that torch records: the fill would be missing, so it is refused.


class Filled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return filled(x, 5.0)


class ManyFilled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return many_filled(x, 5.0)


@pytest.mark.parametrize("module", [Filled, ManyFilled])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_recorded_fill_is_refused(module: type[torch.nn.Module], mode: Any) -> None:
    with pytest.raises(RuntimeError, match=r"tracing into a graph, which would lack the fill; use x\.fill_"):
        make_fx(module(), tracing_mode=mode)(torch.ones(3))
    with pytest.raises(RuntimeError, match="tracing into a graph"):
        make_fx(module(), tracing_mode=mode, pre_dispatch=True)(torch.ones(3))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("module", [Filled, ManyFilled])
def test_a_fill_is_not_traced_by_torch_jit(module: type[torch.nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"tracing into a graph, which would lack the fill; use x\.fill_"):
        torch.jit.trace(module(), torch.ones(3))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("record", [make_fx, lambda function: lambda x: torch.jit.trace(function, x)])  # type: ignore[no-untyped-call]
def test_a_plan_is_not_recorded_either(record: Callable[..., Any]) -> None:
    x = torch.ones(3)
    plan = gpuconst.plan_fill([x], 5.0)

    def function(y: torch.Tensor) -> torch.Tensor:
        plan.fill()
        return y + x

    with pytest.raises(RuntimeError, match="tracing into a graph"):
        record(function)(torch.ones(3))
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize("module", [Filled, ManyFilled])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_fill_is_refused(module: type[torch.nn.Module], strict: bool) -> None:
    torch._dynamo.reset()
    with pytest.raises(
        (RuntimeError, torch._dynamo.exc.Unsupported), match=r"tracing into a graph|should not be traced"
    ):
        torch.export.export(module(), (torch.ones(3),), strict=strict)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (torch.vmap, [2, 2, 2]),
        (torch.func.functionalize, [2, 2, 2]),
        (lambda f: torch.func.grad(lambda x: f(x).sum()), [2, 2, 2]),
        (lambda f: torch.func.hessian(lambda x: (x * f(x)).sum()), [[4, 0, 0], [0, 4, 0], [0, 0, 4]]),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1], [2, 2, 2]),
    ],
    ids=["vmap", "functionalize", "grad", "hessian", "jvp"],
)
def test_a_new_array_is_a_constant_to_transforms(transform: Callable[..., Any], expected: Any, dtype: str) -> None:
    made: list[tuple[gpuconst.Array, torch.Tensor]] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        array = gpuconst.full((), 2.0, dtype=dtype, device="cpu")
        made.append((array, array.to_torch()))
        return x * made[-1][1].float()

    assert transform(function)(torch.ones(3)).tolist() == expected
    assert all(tensor.data_ptr() == array.data_ptr() for array, tensor in made)


def test_recomputed_activations_are_filled_again() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(3, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        mask = gpuconst.fill(torch.empty(3), 2.0)
        return (x * mask).sin()

    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * torch.tensor([2.0] * 3).cos())


# Shards, in processes of their own.


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[[str, int], list[str]]:
    """Run code in several gloo processes, and return what each printed."""

    def run(code: str, count: int) -> list[str]:
        opening = f"""
            import torch, gpuconst, os, sys
            import torch.distributed as dist
            rank = int(os.environ["RANK"])
            dist.init_process_group(
                "gloo", store=dist.FileStore({str(tmp_path / "store")!r}, {count}), rank=rank, world_size={count}
            )
            mesh = dist.device_mesh.init_device_mesh("cpu", ({count},))
        """
        source = textwrap.dedent(opening) + textwrap.dedent(code) + "\ndist.barrier()\ndist.destroy_process_group()\n"
        # Without the interpreter's own end: gloo's threads now and then outlive it, and abort the process.
        source += "sys.stdout.flush()\nos._exit(0)\n"
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", source],
                env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        printed = []
        for process in processes:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            printed.append(out.strip())
        return printed

    return run


def test_uneven_and_empty_shards(run_ranks: Callable[[str, int], list[str]]) -> None:
    code = """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        def sharded(*shape, placement=Shard(0)):
            return distribute_tensor(torch.zeros(shape), mesh, [placement])

        uneven, empty, columns = sharded(3, 2), sharded(1), sharded(2, 3, placement=Shard(1))
        whole = sharded(2, placement=Replicate())
        assert len(empty.to_local()) == (1 if rank == 0 else 0)
        assert gpuconst.fill(uneven, 1.0) is uneven
        gpuconst.fill(empty, 2.0)
        assert (uneven.full_tensor() == 1).all() and (empty.full_tensor() == 2).all()
        plain = torch.zeros(2)
        gpuconst.fill_many([uneven, empty, columns, whole, plain], [3.0, 4.0, 5.0, 6.0, 7.0])
        plan = gpuconst.plan_fill([columns, empty], [8.0, 9.0])
        values = [t.full_tensor().unique().tolist() for t in (uneven, empty, columns, whole)]
        plan.fill()
        print(values, plain.tolist(), columns.full_tensor().unique().tolist(), empty.full_tensor().tolist())
        assert plan.stale() == []

        module = torch.nn.Linear(4, 3, device="meta")
        module.weight = torch.nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]), requires_grad=False)
        gpuconst.torch.materialize_(module, {"weight": torch.nn.init.uniform_, "bias": 0.5}, device="cpu")
        assert isinstance(module.weight, torch.nn.Parameter) and type(module.bias.data) is torch.Tensor
        values = module.weight.full_tensor()
        print(type(module.weight).__name__, module.weight.requires_grad, len(values.unique()), module.bias.tolist())
    """
    filled, made = "[[3.0], [4.0], [5.0], [6.0]] [7.0, 7.0] [8.0] [9.0]", "DTensor False 12 [0.5, 0.5, 0.5]"
    assert run_ranks(code, 2) == [f"{filled}\n{made}"] * 2


def test_fsdp_from_meta_to_a_training_step(run_ranks: Callable[[str, int], list[str]]) -> None:
    code = """
        from torch import nn
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        def build():
            return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1), nn.BatchNorm1d(1))

        with torch.device("meta"):
            model = build()
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rules = {"*.bias": 0.0, "3.*": 1, "0.weight": 0.5, "*": lambda t: nn.init.constant_(t, 0.25)}
        gpuconst.torch.materialize_(model, rules)
        local = model[0].weight.to_local()
        assert local.shape == (3 if rank == 0 else 2, 3) and (local == 0.5).all()
        assert len(model[2].bias.to_local()) == (1 if rank == 0 else 0)
        assert all(isinstance(p, DTensor) and p.requires_grad for p in model.parameters())

        reference = gpuconst.torch.materialize_(build(), rules)
        torch.manual_seed(rank)
        x = torch.randn(4, 3)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
        for m in (model, reference):
            m(x).square().sum().backward()
        for p in reference.parameters():
            dist.all_reduce(p.grad); p.grad /= 2
        for optimizer in optimizers:
            optimizer.step()
        for ours, theirs in zip(model.parameters(), reference.parameters()):
            torch.testing.assert_close(ours.full_tensor(), theirs)

        # Again, in real memory: not in the gathered parameters that a forward pass left behind.
        model(x)
        gpuconst.torch.materialize_(model, {"*": 1})
        print([p.full_tensor().unique().tolist() for p in model.parameters()])

        # Of the last four, the second process has nothing.
        assert sum(not len(p.to_local()) for p in model.parameters()) == (0 if rank == 0 else 4)
        gpuconst.torch.materialize_(model, {"2.bias": 2, "3.weight": 3, "3.bias": 4, "*": 1})
        print([p.full_tensor().unique().tolist() for p in model.parameters()])
    """
    once, again = "[[1.0], [1.0], [1.0], [1.0], [1.0], [1.0]]", "[[1.0], [1.0], [1.0], [2.0], [3.0], [4.0]]"
    assert run_ranks(code, 2) == [f"{once}\n{again}"] * 2
