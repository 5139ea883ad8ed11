"""Weights that torch computes from other tensors, set by their own names: parametrizations, and the older hooks."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from materializing import on_cpu, on_meta, train_a_step
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from gpuconst.torch import materialize_


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def older_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


NORMED = {
    "parametrization": (weight_norm, "parametrizations.weight.original0"),
    "hook": (older_weight_norm, "weight_g"),
}


@pytest.mark.parametrize("build", [on_meta, on_cpu])
@pytest.mark.parametrize("kind", NORMED)
def test_a_weight_normed_convolution_is_set_by_the_name_of_its_weight(kind: str, build: Callable[..., Any]) -> None:
    wrap, magnitude = NORMED[kind]
    module = build(lambda: wrap(nn.Conv1d(3, 4, 5)))
    materialize_(module, {"weight": 0.5, "bias": 0.25})
    torch.testing.assert_close(module.weight.detach(), torch.full((4, 3, 5), 0.5))
    torch.testing.assert_close(module.get_parameter(magnitude).flatten(), torch.full((4,), 0.5 * 15**0.5))
    torch.testing.assert_close(module(torch.ones(1, 3, 5)).detach(), torch.full((1, 4, 1), 7.75))
    with torch.no_grad():  # a step along the direction of the weight itself changes no direction
        fresh = nn.init.normal_(torch.empty(4, 3, 5))
    materialize_(module, {"weight": lambda t: t.copy_(fresh), "bias": 0.0})
    torch.testing.assert_close(module.weight.detach(), fresh)
    train_a_step(module, torch.randn(2, 3, 9))


@pytest.mark.parametrize("kind", NORMED)
def test_a_weight_that_weight_norm_cannot_give_is_refused(kind: str) -> None:
    wrap, magnitude = NORMED[kind]
    module = on_meta(lambda: wrap(nn.Conv1d(3, 4, 5)))
    with pytest.raises(
        ValueError,
        match=rf"'weight', by the rule '\*': .*0\.0 would become nan; drop .*, or put .* for '{magnitude}', ",
    ):
        materialize_(module, {"*": 0.0})
    assert module.bias.is_meta


@pytest.mark.parametrize("kind", NORMED)
def test_originals_are_set_by_their_names(kind: str) -> None:
    wrap, magnitude = NORMED[kind]
    module = on_meta(lambda: wrap(nn.Conv1d(3, 4, 5)))
    materialize_(module, {magnitude: 15**0.5, "*weight*": 3.0, "*": 0.0})
    torch.testing.assert_close(module.weight.detach(), torch.ones(4, 3, 5))
    train_a_step(module, torch.randn(2, 3, 9))


def test_the_name_of_a_weight_whose_originals_are_set_is_an_error() -> None:
    module = on_meta(lambda: weight_norm(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="the rule 'weight' has no effect: its tensor follows '\\*original\\?'"):
        materialize_(module, {"*original?": 3.0, "weight": 1.0, "*": 0.0})


@pytest.mark.parametrize("kind", NORMED)
def test_the_name_of_an_original_whose_weight_is_set_is_an_error(kind: str) -> None:
    wrap, magnitude = NORMED[kind]
    module = on_meta(lambda: wrap(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=f"the rule '{magnitude}' has no effect: its tensor follows 'weight'"):
        materialize_(module, {"weight": 1.0, magnitude: 3.0, "*": 0.0})


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("build", [on_meta, on_cpu])
def test_a_chain_of_parametrizations(build: Callable[..., Any], value: float) -> None:
    module = build(lambda: nn.Linear(3, 4))
    for _ in range(2):
        register_parametrization(module, "weight", Doubled())
    materialize_(module, {"*": value})
    assert (module.weight == value).all()
    assert (module.parametrizations.weight.original == value / 4).all()


def test_a_weight_in_real_memory_is_computed_where_it_is() -> None:
    module = weight_norm(nn.Linear(3, 4))
    with torch.device("meta"):
        materialize_(module, {"*": 0.5})
    torch.testing.assert_close(module.weight.detach(), torch.full((4, 3), 0.5))


def test_a_parametrization_without_inverse_is_refused() -> None:
    module = nn.Linear(3, 4, device="meta")
    register_parametrization(module, "weight", Squared())
    with pytest.raises(ValueError, match=r"Squared has no right_inverse; .* rules for '.*\.original' before"):
        materialize_(module, {"*": 1.0})
    materialize_(module, {"*original": 3.0, "*": 0.0})
    assert (module.weight == 9).all()


def test_a_parametrization_with_state_is_refused_and_the_message_leads_out() -> None:
    module = spectral_norm(nn.Linear(3, 4))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"further tensors; .* rules for .*\.original', .*0\._u', .*0\._v' before"):
        materialize_(module, {"bias": 0.0, "weight": 1.0, "*._?": 0.0})
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    original = "parametrizations.weight.original"
    materialize_(module, {original: 0.5, "*weight": 0.5, "*._?": nn.init.ones_, "bias": 0.0})
    assert (module.get_parameter(original) == 0.5).all()


def test_it_is_refused_before_any_function_runs() -> None:
    module = nn.Sequential(nn.Linear(2, 3), spectral_norm(nn.Linear(3, 4)))
    before = module[0].weight.clone()  # type: ignore[operator]
    with pytest.raises(ValueError, match="depends on"):
        materialize_(module, {"*": nn.init.zeros_})
    assert torch.equal(module[0].weight, before)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, partial(prune.identity, name="weight")])
def test_what_hooks_compute_is_there_before_the_first_call(wrap: Callable[[nn.Module], Any]) -> None:
    module = on_meta(lambda: wrap(nn.Linear(3, 4)))
    materialize_(module, {"*": 1.0})
    before = module.weight.detach().clone()
    module.eval()(torch.ones(3))
    assert torch.equal(module.weight, before)


def test_a_parametrization_that_has_no_such_value_is_refused() -> None:
    module: Any = orthogonal(nn.Linear(3, 3), orthogonal_map="householder", use_trivialization=False)
    with pytest.raises(ValueError, match="Orthogonal cannot give that weight"):
        materialize_(module, {"weight": 1.0, "*": 0.0})
    materialize_(module, {"weight": nn.init.orthogonal_, "*": 0.0})
    torch.testing.assert_close(module.weight @ module.weight.T, torch.eye(3), atol=1e-5, rtol=0)


class Clamped(nn.Module):
    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return original.clamp(max=1.0)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Shifted(nn.Module):
    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return original + 1

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - 1


class Rounded(nn.Module):
    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return original.round(decimals=1)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


@pytest.mark.parametrize(("value", "becomes"), [(0.995, r"1\.0"), (0.0001, r"0\.0")])
def test_a_weight_that_would_be_a_little_off_is_refused(value: float, becomes: str) -> None:
    module = nn.Linear(3, 4)
    register_parametrization(module, "weight", Rounded())
    with pytest.raises(ValueError, match=rf"Rounded cannot give that weight: \S+ would become {becomes};"):
        materialize_(module, {"weight": value, "*": 0.0})
    materialize_(module, {"weight": 0.1, "*": 0.0})
    assert (module.weight == 0.1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_everywhere(value: float) -> None:
    module: Any = nn.Linear(3, 4)
    register_parametrization(module, "weight", Doubled())
    materialize_(module, {"weight": value, "*": 0.0})
    torch.testing.assert_close(module.weight, torch.full((4, 3), value), equal_nan=True)


def test_infinity_is_not_near_to_what_is_finite() -> None:
    module = nn.Linear(3, 4)
    register_parametrization(module, "weight", Clamped())
    with pytest.raises(ValueError, match=r"Clamped cannot give that weight: inf would become 1\.0;"):
        materialize_(module, {"weight": math.inf, "*": 0.0})


def test_a_parametrized_weight_of_integers() -> None:
    module: Any = nn.Module()
    module.register_buffer("weight", torch.zeros(3, dtype=torch.int32))
    register_parametrization(module, "weight", Shifted())
    materialize_(module, {"weight": 7})
    assert module.weight.tolist() == [7, 7, 7]


def test_a_parametrized_weight_without_elements() -> None:
    module: Any = nn.Module()
    module.weight = nn.Parameter(torch.empty(3, 0, device="meta"))
    register_parametrization(module, "weight", Doubled())
    materialize_(module, {"weight": 0.5})
    assert module.weight.shape == (3, 0)
    assert module.weight.is_cpu
