"""Whole torch modules, from the meta device to memory with values."""

import copy
import doctest
import io
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from materializing import on_cpu, on_meta, train_a_step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gpuconst
from gpuconst import DeviceUnavailableError, OutOfMemoryError
from gpuconst.torch import materialize_


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
    module.register_buffer("learned", torch.empty(2, device="meta", requires_grad=True), persistent=False)
    materialize_(module, {"*": 0.5})
    assert type(module.weight) is Annotated
    assert module.weight.partition == "rows"
    assert not module.weight.requires_grad
    assert module.learned.requires_grad
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


@pytest.mark.parametrize("order", list(itertools.permutations(["rows", "columns", "none"])), ids=", ".join)
def test_views_that_do_not_overlap_become_tensors_of_their_own(order: tuple[str, ...]) -> None:
    module: Any = nn.Module()
    rows, columns = torch.triu_indices(3, 3, device="meta")
    views = {"rows": rows, "columns": columns, "none": rows[2:2]}
    for name in order:
        module.register_buffer(name, views[name])
    materialize_(module, {"rows": 1, "columns": 2, "none": 3}, device="cpu")
    assert module.rows.tolist() == [1] * 6
    assert module.columns.tolist() == [2] * 6


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
