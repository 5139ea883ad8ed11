"""Modules and rules that `materialize_` refuses before it does anything, and what it warns of."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gpuconst.torch import materialize_


class Wrapping(torch.Tensor):
    """A subclass that keeps its data in another tensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapping":
        made: Wrapping = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=True
        )
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0])
        raise NotImplementedError(func)


def wrapping() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(Wrapping(torch.empty(3, device="meta")))
    return module


def views_of_one_storage() -> nn.Module:
    module = nn.Module()
    table = torch.empty(8, device="meta")
    module.register_buffer("cos", table[:5])
    module.register_buffer("sin", table[4:])
    return module


def in_the_same_memory() -> nn.Module:
    module = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    module["head"].weight.data = module["embed"].weight.data
    return module


def buffers(*tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_buffer(f"buffer{number}", tensor)
    return module


def in_part_of_the_same_memory() -> nn.Module:
    memory = torch.zeros(20)
    return buffers(memory[:20], memory[:5], memory[10:15])


def whole_after_its_parts() -> nn.Module:
    memory = torch.zeros(20)
    return buffers(memory[:5], memory[10:15], memory)


def fake() -> nn.Module:
    with FakeTensorMode():
        return nn.Linear(2, 2)


def buffer(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("x", tensor)
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "uncovered": (
        lambda: nn.Linear(2, 2, device="meta"),
        {"weight": 1.0},
        ValueError,
        "no rule covers 'bias'; a last rule '*' would",
    ),
    "uncovered buffer": (
        lambda: nn.BatchNorm1d(2, device="meta"),
        {"weight": 1.0, "bias": 0.0},
        ValueError,
        "no rule covers 'running_mean', 'running_var', 'num_batches_tracked';",
    ),
    "uncovered in real memory": (lambda: nn.Linear(2, 2), {"bias": 0.0}, ValueError, "no rule covers 'weight'"),
    "unmatched": (
        lambda: nn.Linear(2, 2, device="meta"),
        {"*.bias": 0.0, "*": 1.0},
        ValueError,
        "the rule '*.bias' matches nothing; the nearest of 2 names: 'bias', 'weight'",
    ),
    "too large": (
        lambda: nn.Linear(2, 2, dtype=torch.float16, device="meta"),
        {"bias": 1e6, "*": 0.0},
        OverflowError,
        "'bias', by the rule 'bias': 1000000.0 does not fit float16",
    ),
    "fraction": (
        lambda: nn.BatchNorm1d(2, device="meta"),
        {"*": 0.5},
        TypeError,
        "'num_batches_tracked', by the rule '*': ",
    ),
    "no scalar": (lambda: nn.Linear(2, 2, device="meta"), {"*": torch.ones(2)}, TypeError, "'weight', by the rule '*'"),
    "text": (lambda: nn.Linear(2, 2, device="meta"), {"*": "normal"}, TypeError, "fill_value is 'normal'"),
    "lazy": (lambda: nn.LazyLinear(2, device="meta"), {"*": 0.0}, ValueError, "'weight' has no shape yet"),
    "wrapper": (wrapping, {"*": 0.0}, TypeError, "'weight' is a Wrapping, which keeps its data in other tensors"),
    "fake": (fake, {"*": 0.0}, TypeError, "'weight' is a FakeTensor"),
    "views": (
        views_of_one_storage,
        {"*": 0.0},
        ValueError,
        "'cos' and 'sin' are different views of one storage",
    ),
    "one memory": (
        in_the_same_memory,
        {"embed.*": 1.0, "*": 2.0},
        ValueError,
        "'embed.weight', by the rule 'embed.*', and 'head.weight', by the rule '*', share memory",
    ),
    "one memory in part": (
        in_part_of_the_same_memory,
        {"buffer2": 2.0, "*": 1.0},
        ValueError,
        "'buffer0', by the rule '*', and 'buffer2', by the rule 'buffer2', share memory; give both the same value",
    ),
    "one memory, the whole last": (
        whole_after_its_parts,
        {"buffer0": 2.0, "*": 1.0},
        ValueError,
        "'buffer0', by the rule 'buffer0', and 'buffer2', by the rule '*', share memory; give both the same value",
    ),
    "lazily negated": (
        lambda: buffer(torch.ones(3, dtype=torch.complex64).conj().imag),
        {"*": 0.0},
        ValueError,
        "'x', by the rule '*': the tensor is a lazy negative",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_mistakes_are_found_before_anything_is_done(kind: str) -> None:
    make, rules, error, message = REFUSED[kind]
    module = make()
    tensors = [*module.parameters(), *module.buffers()]
    versions = [tensor._version for tensor in tensors]
    with pytest.raises(error, match=re.escape(message)):
        materialize_(module, rules)
    after = [*module.parameters(), *module.buffers()]
    assert all(then is now for then, now in zip(tensors, after, strict=True))
    assert versions == [tensor._version for tensor in after]


def test_buffers_that_lie_between_each_others_elements_are_filled_with_different_constants() -> None:
    columns = torch.zeros(6, 2)
    module = materialize_(buffers(columns[:, 0], columns[:, 1]), {"buffer0": 1.0, "buffer1": 2.0})
    assert columns.tolist() == [[1.0, 2.0]] * 6
    assert [buffer.data_ptr() for buffer in module.buffers()] == [columns.data_ptr(), columns.data_ptr() + 4]


def test_only_modules() -> None:
    with pytest.raises(TypeError, match=r"module is Tensor, expected a torch\.nn\.Module"):
        materialize_(torch.empty(3), {"*": 0.0})  # type: ignore[type-var]


def test_tensors_that_are_neither_parameters_nor_buffers_are_named() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)
            self.mask, self.number = torch.ones(3), 3
            self.tables = {"sin": torch.ones(3)}
            self.again = [self.linear.weight]

    with torch.device("meta"):
        module = nn.Sequential(Masked(), nn.Linear(3, 3))
    said = r"^'0\.mask', '0\.tables', '0\.again' still have no memory: they are neither parameters nor buffers"
    with pytest.warns(UserWarning, match=said) as caught:
        materialize_(module, {"*": 0.5}, device="cpu")
    assert caught[0].filename == __file__


@pytest.mark.needs("keras")
def test_keras_layers_without_memory_are_refused(run_python: Callable[..., str]) -> None:
    code = """
        import gpuconst, keras, torch

        with keras.device("meta"):
            dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        for module, name in ((dense, "the module"), (torch.nn.Sequential(torch.nn.ReLU(), dense), "'1'")):
            try:
                gpuconst.torch.materialize_(module, {"*": 1.0})
            except TypeError as error:
                assert str(error).startswith(f"{name} is a Keras Sequential"), error
            else:
                raise AssertionError("a Keras layer was materialized")
        dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        gpuconst.torch.materialize_(dense, {"*": 1.0})
        assert dense(torch.ones(1, 4)).tolist() == [[5.0] * 3]
    """
    run_python(code, KERAS_BACKEND="torch")
