"""Weights that torch computes from others: parametrizations, and the older weight norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["Computed", "computed_weights", "refresh"]


class Computed(NamedTuple):
    """A weight that is computed from its originals.

    Attributes
    ----------
    name : str
        Of the weight, in its module.
    slots : list of (torch.nn.Module, str)
        Where the originals are: their module, and their name there.
    compute : callable
        Takes the originals and returns the weight.
    invert : callable
        Takes a weight and returns originals of it; raises NotImplementedError if there is no inverse.
    own : list of torch.Tensor
        Further tensors that the weight depends on.
    kind : str
        What computes it, for messages.
    """

    name: str
    slots: list[tuple[torch.nn.Module, str]]
    compute: Callable[..., torch.Tensor]
    invert: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    own: list[torch.Tensor]
    kind: str

    def originals(self) -> list[torch.Tensor]:
        """Return the tensors from which the weight is computed."""
        return [getattr(owner, name) for owner, name in self.slots]

    def outline(self) -> torch.Tensor:
        """Return the weight on the meta device: its shape and its dtype.

        Raises
        ------
        ValueError
            If it depends on more than its originals.
        """
        if self.own:
            raise ValueError(f"what {self.kind} makes of a value depends on further tensors")
        return self.compute(*[torch.empty_like(original, device="meta") for original in self.originals()])

    def originals_of(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return originals from which the given weight would be computed.

        Raises
        ------
        ValueError
            If there are none, or they cannot be found.
        """
        try:
            originals = self.invert(weight)
        except NotImplementedError as error:
            raise ValueError(f"{self.kind} cannot be inverted: {error}") from error
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.kind} does not take the value: {error}") from error
        back = self.compute(*originals)
        # Half of the digits: as many as a sum over a long row may lose.
        exact = not (weight.is_floating_point() or weight.is_complex())
        digits = 0.0 if exact else torch.finfo(weight.dtype).eps ** 0.5
        largest = float(weight.abs().nan_to_num(0.0, 0.0).max()) if weight.numel() else 0.0
        wrong = ~torch.isclose(back, weight, rtol=0.0, atol=digits * largest, equal_nan=True)
        if wrong.any():
            at = int(wrong.flatten().int().argmax())
            raise ValueError(
                f"{self.kind} cannot give that weight: {weight.flatten()[at].item()} would become "
                f"{back.flatten()[at].item()}"
            )
        return originals


def computed_weights(owner: torch.nn.Module) -> Iterator[Computed]:
    """Yield the weights that a module itself, apart from its children, computes from other tensors."""
    if "parametrizations" in owner._modules and is_parametrized(owner):
        for name, parametrizations in owner.parametrizations.items():  # type: ignore[union-attr, operator]
            yield _parametrized(name, parametrizations)
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield _weight_normed(owner, hook)


def _weight_normed(owner: torch.nn.Module, hook: WeightNorm) -> Computed:
    def compute(magnitude: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        return torch._weight_norm(direction, magnitude, hook.dim)

    def invert(weight: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.norm_except_dim(weight, 2, hook.dim), weight

    slots = [(owner, f"{hook.name}_g"), (owner, f"{hook.name}_v")]
    return Computed(hook.name, slots, compute, invert, [], "weight_norm")


def _parametrized(name: str, parametrizations: ParametrizationList) -> Computed:
    chain: list[torch.nn.Module] = list(parametrizations)

    def compute(*originals: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = chain[0](*originals)
        for module in chain[1:]:
            weight = module(weight)
        return weight

    def invert(weight: torch.Tensor) -> Sequence[torch.Tensor]:
        value: Any = weight
        for module in reversed(chain):
            if not hasattr(module, "right_inverse"):
                raise NotImplementedError(f"{type(module).__name__} has no right_inverse")
            value = module.right_inverse(value)  # type: ignore[operator]
        return (value,) if parametrizations.is_tensor else tuple(value)

    originals = [f"original{index}" for index in range(parametrizations.ntensors)]
    return Computed(
        name,
        [(parametrizations, original) for original in (["original"] if parametrizations.is_tensor else originals)],
        compute,
        invert,
        [tensor for module in chain for tensor in itertools.chain(module.parameters(), module.buffers())],
        " and ".join(type(module).__name__.lstrip("_") for module in chain),
    )


def refresh(owner: torch.nn.Module) -> None:
    """Recompute what hooks keep beside the originals: the older weight and spectral norm, and pruning."""
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):  # calling it would continue its power iteration
            setattr(owner, hook.name, hook.compute_weight(owner, do_power_iteration=False))
        elif isinstance(hook, WeightNorm | BasePruningMethod):
            hook(owner, None)
