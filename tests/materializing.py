"""What the tests of `materialize_` share: modules with and without memory, and a step of training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def on_meta(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make()


def on_cpu(make: Callable[[], nn.Module]) -> Any:
    return make()


def train_a_step(module: nn.Module, *inputs: torch.Tensor) -> None:
    """Take an optimizer's step, which must change every parameter that requires grad."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    output = module(*inputs)
    (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    optimizer.step()
    for then, now in zip(before, module.parameters(), strict=True):
        assert torch.isfinite(now).all()
        assert not torch.equal(then, now)
