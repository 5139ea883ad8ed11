"""The time to give a torch module on the meta device memory and values, in a fresh process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases.pages import touch_and_free
from benchmarks.cases.peers import on_threads
from benchmarks.contest import VALUE, Case, Contender, Row

#: Width of the model, number of heads, width of the feed-forward part, and number of such models.
_MODELS = {"12 layers, 85 million parameters": (768, 12, 3072, 1), "12 layers, 27 thousand parameters": (16, 4, 32, 20)}
_QUICK_MODELS = {"12 layers, 3 million parameters": (144, 12, 576, 1)}
_LAYERS = 12

_kept: list[Any] = []

Filler = Callable[[Any], None]


def _transformer(width: int, heads: int, hidden: int) -> Any:
    import torch

    with torch.device("meta"):
        layer = torch.nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True)
        return torch.nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)


def _gpuconst(module: Any) -> None:
    import gpuconst

    gpuconst.torch.materialize_(module, {"*bias": 0.0, "*norm*.weight": 1.0, "*": VALUE}, device="cpu")


def _to_empty(module: Any) -> None:
    module.to_empty(device="cpu")


def _to_empty_and_init(module: Any) -> None:
    import torch

    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
            elif "norm" in name:
                torch.nn.init.ones_(parameter)
            else:
                torch.nn.init.constant_(parameter, VALUE)


def _check(module: Any) -> None:
    """Raise AssertionError unless each parameter has its value."""
    for name, parameter in module.named_parameters():
        expected = 0.0 if name.endswith("bias") else 1.0 if "norm" in name else VALUE
        wrong = parameter.detach() != expected
        assert not wrong.any(), f"{name} has {parameter.detach()[wrong][0]}, expected {expected}"


def _measured(filler: Filler, check: Filler) -> Callable[..., Callable[[], float]]:
    """Return a `make` for a contender that keeps its modules and returns the seconds per module."""

    def make(width: int, heads: int, hidden: int, count: int) -> Callable[[], float]:
        filler(_transformer(8, 1, 8))  # work that the library does only once is in another case
        modules = [_transformer(width, heads, hidden) for _ in range(count)]

        def measure() -> float:
            touch_and_free(sum(parameter.nbytes for module in modules for parameter in module.parameters()))
            start = time.perf_counter()
            for module in modules:
                filler(module)
            seconds = time.perf_counter() - start
            for module in modules:
                check(module)
            _kept.extend(modules)
            return seconds / count

        return measure

    return make


_CONTENDERS = [
    Contender("materialize_", _measured(_gpuconst, _check), ours=True),
    *reversed(on_threads(Contender("to_empty + nn.init", _measured(_to_empty_and_init, _check)))),
    Contender("to_empty (no values)", _measured(_to_empty, lambda module: None), beside=True),
]
#: Without the others, whose processes would only import torch once more.
_QUICK_CONTENDERS = _CONTENDERS[:2]


def rows(quick: bool) -> list[Row]:
    """Return a row dominated by the memory, and one dominated by the number of tensors."""
    contenders = _QUICK_CONTENDERS if quick else _CONTENDERS
    return [
        Row(label, contenders, {"width": width, "heads": heads, "hidden": hidden, "count": count})
        for label, (width, heads, hidden, count) in (_QUICK_MODELS if quick else _MODELS).items()
    ]


CASE = Case("A torch module from the meta device, in a fresh process", rows, fresh=True, rounds=7)
