"""Whole torch modules, from the meta device to memory with values."""

import copy
import doctest
import io
import itertools
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

import gpuconst
from gpuconst import DeviceUnavailableError, OutOfMemoryError
from gpuconst.torch import materialize_


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


class Rotary(nn.Module):
    """Rotary positions, whose frequencies are a buffer that no checkpoint has."""

    inv_freq: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(width // 2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * self.inv_freq
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)


class LanguageModel(nn.Module):
    """Embedding and head are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.rotary = Rotary(8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.rotary(self.embed(tokens))))
        return result


def frequencies(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.copy_(10000.0 ** -torch.linspace(0, 1, len(tensor)))


LANGUAGE_RULES: dict[str, Any] = {
    "*.bias": 0.0,
    "*norm*.weight": 1.0,
    "*.inv_freq": frequencies,
    "*": partial(nn.init.normal_, std=0.02),
}


@pytest.mark.parametrize("build", [on_meta, on_cpu])
def test_a_language_model_with_tied_embeddings_and_rotary_positions(build: Callable[..., Any]) -> None:
    model = build(LanguageModel)
    torch.manual_seed(0)
    assert materialize_(model, LANGUAGE_RULES) is model
    assert model.head.weight is model.embed.weight
    assert (model.norm.weight == 1).all()
    assert (model.norm.bias == 0).all()
    assert torch.equal(model.rotary.inv_freq, 10000.0 ** -torch.linspace(0, 1, 4))
    assert "rotary.inv_freq" not in model.state_dict()
    torch.manual_seed(0)
    assert torch.equal(model.embed.weight, nn.init.normal_(torch.empty(11, 8), std=0.02))
    train_a_step(model, torch.tensor([[1, 5, 7]]))
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("build", [on_meta, on_cpu])
def test_a_transformer_encoder_has_the_values_that_torchs_own_functions_give(build: Callable[..., Any]) -> None:
    layer = partial(nn.TransformerEncoderLayer, 16, 4, 32, batch_first=True)
    model = build(lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False))
    reference = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)
    rules = {"*bias": 0.0, "*norm*.weight": 1.0, "*": nn.init.xavier_uniform_}
    torch.manual_seed(1)
    materialize_(model, rules)
    torch.manual_seed(1)
    for name, parameter in reference.named_parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    model.load_state_dict(reference.state_dict())
    train_a_step(model, torch.randn(2, 5, 16))


def test_an_lstm_computes_with_the_new_weights() -> None:
    model = materialize_(nn.LSTM(3, 4, num_layers=2, device="meta"), {"*": 0.1})
    reference = nn.LSTM(3, 4, num_layers=2)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.fill_(0.1)
    x = torch.randn(5, 1, 3)
    assert torch.equal(model(x)[0], reference(x)[0])
    train_a_step(model, x)


def test_batch_norm_has_its_buffers_and_their_dtypes() -> None:
    model = materialize_(
        nn.BatchNorm1d(3, device="meta"), {"weight": 1.0, "*_mean": 0.0, "*_var": 1.0, "*": 0, "bias": 0}
    )
    assert model.num_batches_tracked is not None
    assert model.num_batches_tracked.dtype == torch.int64
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in nn.BatchNorm1d(3).state_dict().items()
    }
    train_a_step(model, torch.randn(4, 3))


DTYPES = ["float16", "bfloat16", "float64", "complex64", "float8_e4m3fn", "int8", "bool", "uint16"]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str) -> None:
    module: Any = nn.Module()
    module.register_buffer("x", torch.empty(3, dtype=getattr(torch, name), device="meta"))
    materialize_(module, {"x": True if name == "bool" else 1})
    assert module.x.dtype == getattr(torch, name)
    assert module.x.to(torch.complex64).tolist() == [1, 1, 1]


def test_raw_bits() -> None:
    module = materialize_(nn.Linear(2, 2, device="meta"), {"*": b"\x01\x00\xc0\x7f"})
    assert module.weight.view(torch.int32).tolist() == [[0x7FC00001] * 2] * 2


class Annotated(nn.Parameter):
    """A parameter of a library of its own, with more to say than torch knows."""

    partition: str


def test_types_attributes_and_requires_grad_stay() -> None:
    module: Any = nn.Module()
    weight = Annotated(torch.empty(3, 2, device="meta"), requires_grad=False)
    weight.partition = "rows"
    module.weight = weight
    module.scale = nn.Buffer(torch.empty(2, device="meta"), persistent=False)
    module.counted = nn.Buffer(torch.empty(2, device="meta"))
    materialize_(module, {"*": 0.5})
    assert type(module.weight) is Annotated
    assert module.weight.partition == "rows"
    assert not module.weight.requires_grad
    assert isinstance(module.scale, nn.Buffer)
    assert set(module.state_dict()) == {"weight", "counted"}
    module.weight = nn.Parameter(torch.empty(1, device="meta"))
    assert materialize_(module, {"*": 0.5}).weight.requires_grad


def test_a_layout_that_is_not_c_ordered_stays() -> None:
    module = on_meta(lambda: nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)
    materialize_(module, {"*": 0.5})
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert (module.weight == 0.5).all()


def test_containers() -> None:
    class Container(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.listed = nn.ParameterList([torch.empty(2), torch.empty(3)])
            self.named = nn.ParameterDict({"a": nn.Parameter(torch.empty(2))})

    module = materialize_(on_meta(Container), {"listed.0": 1.0, "listed.1": 2.0, "named.a": 3.0})
    assert [p[0].item() for p in (*module.listed, module.named["a"])] == [1, 2, 3]


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.Linear(2, 2, device="meta")
    model: Any = nn.Sequential(shared, shared)
    materialize_(model, {"1.weight": 1.0, "*": 0.0})
    assert model[0] is model[1]
    assert (shared.weight == 1).all()
    assert model[0].bias.tolist() == [0, 0]


def test_a_tied_buffer_stays_tied() -> None:
    model: Any = nn.Sequential(nn.Module(), nn.Module())
    mask = torch.empty(3, device="meta")
    for part in model:
        part.register_buffer("mask", mask)
    materialize_(model, {"*": 1.0})
    assert model[0].mask is model[1].mask


# Each parameter owns its storage.


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_large_parameters_are_filled_by_two_threads_and_small_ones_beside_them(name: str) -> None:
    dtype = getattr(torch, name)
    model = on_meta(lambda: nn.Sequential(*[nn.Linear(1024, 1024 + i, dtype=dtype) for i in range(24)]))
    rules = {f"{i}.weight": float(i) for i in range(24)} | {"3.bias": partial(nn.init.constant_, val=0.5), "*": 0.25}
    materialize_(model, rules)
    for i, part in enumerate(model):
        assert (part.weight == i).all()
        assert (part.bias == (0.5 if i == 3 else 0.25)).all()
    addresses = sorted((p.data_ptr(), p.nbytes) for p in model.parameters())
    assert all(start + nbytes <= then for (start, nbytes), (then, _) in itertools.pairwise(addresses))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_too_large_a_module_stays_on_the_meta_device() -> None:
    model = on_meta(lambda: nn.Sequential(*[nn.Linear(1 << 23, 1 << 23) for _ in range(4)]))
    with pytest.raises(OutOfMemoryError, match="the host has no 281,474,976,710,656 bytes left"):
        materialize_(model, {"*": 0.5})
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.fixture
def encoder() -> Any:
    model = on_meta(lambda: nn.TransformerEncoderLayer(64, 4, 128))
    return materialize_(model, {"*": 0.5})


def test_saving_a_bias_writes_a_bias(encoder: Any) -> None:
    for parameter in encoder.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.storage_offset() == 0
    written = io.BytesIO()
    torch.save(encoder.norm1.bias, written)
    assert written.tell() < 4096
    written.seek(0)
    assert torch.equal(torch.load(written), encoder.norm1.bias)


def test_a_copy_is_a_copy(encoder: Any) -> None:
    copied = copy.deepcopy(encoder)
    with torch.no_grad():
        copied.norm1.bias.zero_()
    assert (encoder.norm1.bias == 0.5).all()
    assert copied.norm1.bias.untyped_storage().nbytes() == 64 * 4


def test_safetensors_takes_it(encoder: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_model(encoder, str(tmp_path / "model.safetensors"))
    assert (tmp_path / "model.safetensors").stat().st_size < sum(p.nbytes for p in encoder.parameters()) + 4096
    again = nn.TransformerEncoderLayer(64, 4, 128)
    safetensors.load_model(again, str(tmp_path / "model.safetensors"))
    assert (again.linear1.weight == 0.5).all()


def test_the_memory_goes_with_the_module(run_python: Callable[..., str]) -> None:
    code = """
        import torch, gpuconst

        def peak():  # not getrusage: its peak is inherited from the process that starts this one
            status = dict(line.split(":", 1) for line in open("/proc/self/status"))
            return int(status["VmHWM"].split()[0]) // 1024

        gpuconst.torch.materialize_(torch.nn.Linear(1, 1, device="meta"), {"*": 0.5})
        before = peak()
        for _ in range(20):
            module = torch.nn.Linear(4096, 4096, device="meta")
            gpuconst.torch.materialize_(module, {"*": 0.5})
            del module
        print(peak() - before)
    """
    assert int(run_python(code)) < 200  # one is 64 MiB


# Parametrized weights.


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


@pytest.mark.parametrize("build", [on_meta, on_cpu])
def test_a_chain_of_parametrizations(build: Callable[..., Any]) -> None:
    module = build(lambda: nn.Linear(3, 4))
    for _ in range(2):
        register_parametrization(module, "weight", Doubled())
    materialize_(module, {"*": 1.0})
    assert (module.weight == 1).all()
    assert (module.parametrizations.weight.original == 0.25).all()


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


# Mistakes: found before anything is done.


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


def test_a_parametrized_weight_without_elements() -> None:
    module: Any = nn.Module()
    module.weight = nn.Parameter(torch.empty(3, 0, device="meta"))
    register_parametrization(module, "weight", Doubled())
    materialize_(module, {"weight": 0.5})
    assert module.weight.shape == (3, 0)
    assert module.weight.is_cpu


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


def fake() -> nn.Module:
    with FakeTensorMode():
        return nn.Linear(2, 2)


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
    "lazily negated": (
        lambda: buffer(torch.ones(3, dtype=torch.complex64).conj().imag),
        {"*": 0.0},
        ValueError,
        "'x', by the rule '*': the tensor is a lazy negative",
    ),
}


def buffer(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("x", tensor)
    return module


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


def test_a_function_that_fails_leaves_a_meta_module_as_it_was() -> None:
    module = nn.Linear(2, 3, device="meta")
    with pytest.raises(ValueError, match="Fan in and fan out") as caught:
        materialize_(module, {"*": nn.init.xavier_normal_})
    assert caught.value.__notes__ == ["raised for 'bias', by the rule '*'"]
    assert module.weight.is_meta


def test_an_error_of_any_type_passes_through() -> None:
    def fail(tensor: torch.Tensor) -> None:
        b"\xff".decode()

    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 3, device="meta"))
    with pytest.raises(UnicodeDecodeError) as caught:
        materialize_(module, {"weight": fail, "bias": 0.0}, device="cpu")
    assert caught.value.__notes__ == ["raised for 'weight', by the rule 'weight'"]


def test_functions_run_in_the_order_of_the_module() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, 3), torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 5)
        )

    with torch.device("meta"):
        module = make()
    torch.manual_seed(0)
    materialize_(module, {"*weight": nn.init.normal_, "*": nn.init.normal_}, device="cpu")
    torch.manual_seed(0)
    expected: list[torch.Tensor] = []
    for name, shape in [("0", (3, 2)), ("1", (4, 3)), ("2", (5, 4))]:
        tensors = [torch.empty(shape), torch.empty(shape[0])]
        if name == "1":  # its originals come after its bias
            tensors.reverse()
        expected += [nn.init.normal_(tensor) for tensor in tensors]
    linears: list[Any] = list(module.children())
    found = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    found[2:4] = reversed(found[2:4])
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("module", [nn.Linear(2, 3), nn.BatchNorm1d(3), weight_norm(nn.Linear(2, 3)), nn.LSTM(2, 3)])
def test_a_function_must_write_to_new_memory(module: nn.Module) -> None:
    module = module.to("meta")
    with pytest.raises(ValueError, match=r"by the rule '\*': the function wrote nothing, and there is nothing to keep"):
        materialize_(module, {"*": lambda tensor: None}, device="cpu")
    assert all(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int8, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("inference", [False, True])
def test_a_function_may_write_in_any_way(dtype: torch.dtype, inference: bool) -> None:
    def through_data(tensor: torch.Tensor) -> None:
        tensor.data.fill_(1)

    def through_bytes(tensor: torch.Tensor) -> None:
        tensor.view(torch.uint8).numpy()[:] = torch.ones_like(tensor).view(torch.uint8).numpy()

    def other_memory(tensor: torch.Tensor) -> None:
        tensor.data = torch.ones_like(tensor)

    for write in (nn.init.ones_, through_data, through_bytes, *([] if inference else [other_memory])):
        for length in (1, 5, 100):
            module: Any = nn.Module()
            module.register_buffer("x", torch.empty(length, dtype=dtype, device="meta"))
            with torch.inference_mode(inference):
                materialize_(module, {"x": write}, device="cpu")
            assert (module.x == 1).all()


def test_a_function_need_not_write_where_there_is_nothing_to_write_or_much_to_keep() -> None:
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    module.register_buffer("none", torch.empty(0, device="meta"))
    materialize_(module, {"*": lambda tensor: None})
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_function_that_returns_a_number_is_refused(device: str) -> None:
    with pytest.raises(
        TypeError, match=r"'weight', by the rule '\*': the function returned 0\.5, expected one that wr"
    ):
        materialize_(nn.Linear(2, 3, device=device), {"*": lambda tensor: 0.5}, device="cpu")


def test_buffers_that_lie_between_each_others_elements_are_filled_with_different_constants() -> None:
    columns = torch.zeros(6, 2)
    module = materialize_(buffers(columns[:, 0], columns[:, 1]), {"buffer0": 1.0, "buffer1": 2.0})
    assert columns.tolist() == [[1.0, 2.0]] * 6
    assert [buffer.data_ptr() for buffer in module.buffers()] == [columns.data_ptr(), columns.data_ptr() + 4]


def test_views_that_do_not_overlap_become_tensors_of_their_own() -> None:
    module: Any = nn.Module()
    rows = torch.triu_indices(3, 3, device="meta")
    module.register_buffer("rows", rows[0])
    module.register_buffer("columns", rows[1])
    materialize_(module, {"rows": 1, "columns": 2}, device="cpu")
    assert module.rows.tolist() == [1] * 6
    assert module.columns.tolist() == [2] * 6


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


def test_a_function_that_returns_a_new_tensor_is_refused() -> None:
    module = nn.Linear(2, 3, device="meta")
    with pytest.raises(TypeError, match=r"'weight', by the rule '\*': the function returned a new tensor"):
        materialize_(module, {"*": torch.ones_like})
    materialize_(module, {"*": lambda tensor: tensor.view(-1).fill_(2.0)})
    assert (module.weight == 2).all()


def test_only_modules() -> None:
    with pytest.raises(TypeError, match=r"module is Tensor, expected a torch\.nn\.Module"):
        materialize_(torch.empty(3), {"*": 0.0})  # type: ignore[type-var]


# Devices.


def test_memory_is_where_torch_would_put_it() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="torch makes tensors without memory on 'meta' here; pass device="):
            materialize_(module, {"*": 0.5})
        materialize_(module, {"*": 0.5}, device="cpu")
    assert module.weight.device.type == "cpu"
    assert (module.weight == 0.5).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "gpu", 0])
def test_a_device_that_torch_cannot_use(device: Any) -> None:
    module = nn.Linear(2, 2, device="meta")
    with pytest.raises(DeviceUnavailableError, match=f"^torch cannot use device '{device}': ") as caught:
        materialize_(module, {"*": 0.5}, device=device)
    assert len(str(caught.value)) < 300
    assert module.weight.is_meta


def test_no_memory_is_made_of_fake_tensors() -> None:
    module = nn.Linear(2, 2, device="meta")
    with FakeTensorMode(), pytest.raises(ValueError, match="tensors without memory on 'cpu'"):
        materialize_(module, {"*": 0.5}, device="cpu")


def test_what_has_memory_is_not_moved() -> None:
    module = nn.Linear(2, 2)
    address = module.weight.data_ptr()
    parameter = module.weight
    with pytest.raises(ValueError, match="without memory on 'meta'"):
        materialize_(module, {"*": 0.5}, device="meta")
    materialize_(module, {"*": 0.5}, device="cpu")
    assert module.weight is parameter
    assert module.weight.data_ptr() == address
    assert (module.weight == 0.5).all()


def test_half_a_module_on_meta() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    kept = module[0].weight
    materialize_(module, {"0.*": 1.0, "1.*": 2.0})
    assert module[0].weight is kept
    assert (kept == 1).all()
    assert (module[1].weight == 2).all()


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["argument", "default"])
def test_on_a_gpu_each_parameter_owns_its_storage_in_torchs_memory(where: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch is built without CUDA")
    model = on_meta(LanguageModel)
    if where == "argument":
        materialize_(model, LANGUAGE_RULES, device="cuda")
    else:
        with torch.device("cuda"):
            materialize_(model, LANGUAGE_RULES)
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert (model.norm.weight == 1).all()
    assert model.norm.weight.untyped_storage().nbytes() == 32
    with torch.device("cuda"):
        train_a_step(model, torch.tensor([[1, 5, 7]]))


@pytest.mark.gpu
def test_what_is_in_real_memory_on_another_device_is_refused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch is built without CUDA")
    module = nn.Linear(2, 2, bias=False)
    before = module.weight.clone()
    with pytest.raises(ValueError, match=r"'weight' is in real memory on cpu, and device='cuda:\d' was given"):
        materialize_(module, {"*": 0.5}, device="cuda")
    assert torch.equal(module.weight, before)


@pytest.mark.gpu
def test_an_lstm_on_a_gpu_is_in_one_piece() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch is built without CUDA")
    model = materialize_(nn.LSTM(3, 4, device="meta"), {"*": 0.1}, device="cuda")
    train_a_step(model, torch.randn(5, 1, 3, device="cuda"))  # a warning, were it not


# Modes.


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        module = materialize_(nn.Linear(3, 2, device="meta"), {"*": 0.5})
        assert module(torch.ones(3)).tolist() == [2, 2]


def test_hooks_of_parameters_stay() -> None:
    module: Any = nn.Linear(2, 2, device="meta")
    seen: list[torch.Tensor] = []
    module.weight.register_hook(lambda gradient: gradient * 0)
    handle = module.bias.register_post_accumulate_grad_hook(seen.append)
    materialize_(module, {"*": 1.0})
    for _ in range(2):
        module(torch.ones(2)).sum().backward()
        handle.remove()
    assert (module.weight.grad == 0).all()
    assert len(seen) == 1
    assert seen[0] is module.bias


def test_a_compiled_function_materializes() -> None:
    module = nn.Linear(3, 2, device="meta")

    def function(x: torch.Tensor) -> Any:
        materialize_(module, {"weight": 0.5, "bias": 1.0})
        return module(x * 2)

    assert torch.compile(function, backend="aot_eager")(torch.ones(3)).tolist() == [4, 4]


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


def test_a_compiled_module_is_materialized_before_it_runs() -> None:
    module: Any = torch.compile(nn.Linear(3, 2, device="meta"), backend="eager")
    materialize_(module, {"*.weight": 0.5, "*.bias": 1.0})
    assert module(torch.ones(3)).tolist() == [2.5, 2.5]


def test_a_module_without_tensors_needs_no_rules() -> None:
    assert isinstance(materialize_(nn.ReLU(), {}), nn.ReLU)


def test_it_is_reached_from_the_package(run_python: Callable[..., str]) -> None:
    code = """
        import gpuconst, sys
        assert "torch" not in sys.modules
        module = gpuconst.torch.materialize_(__import__("torch").nn.Linear(1, 1, device="meta"), {"*": 0.5})
        print(module.weight.item(), gpuconst.__name__)
    """
    assert run_python(code) == "0.5 gpuconst"


def test_the_example_in_the_documentation() -> None:
    failed, attempted = doctest.testmod(gpuconst.torch)
    assert (failed, attempted > 0) == (0, True)
