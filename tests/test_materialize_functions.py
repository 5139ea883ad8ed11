"""Functions as rules: when they run, what they must do, and what becomes of their errors."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from gpuconst.torch import materialize_


def test_a_function_that_fails_leaves_a_meta_module_as_it_was() -> None:
    module = nn.Linear(2, 3, device="meta")
    with pytest.raises(ValueError, match="Fan in and fan out") as caught:
        materialize_(module, {"*": nn.init.xavier_normal_})
    assert caught.value.__notes__ == ["raised for 'bias', by the rule '*'"]
    assert module.weight.is_meta


def test_an_error_of_any_type_passes_through() -> None:
    def fail(tensor: torch.Tensor) -> None:
        b"\xff".decode()

    module = weight_norm(nn.Linear(2, 3, device="meta"))
    with pytest.raises(UnicodeDecodeError) as caught:
        materialize_(module, {"weight": fail, "bias": 0.0}, device="cpu")
    assert caught.value.__notes__ == ["raised for 'weight', by the rule 'weight'"]


def test_functions_run_in_the_order_of_the_module() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), weight_norm(nn.Linear(3, 4)), nn.Linear(4, 5))

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


def test_a_default_device_is_not_that_of_the_module() -> None:
    with torch.device("meta"):
        module = materialize_(nn.Linear(2, 3), {"bias": nn.init.ones_, "*": 0.5}, device="cpu")
    assert module.bias.tolist() == [1.0, 1.0, 1.0]
    assert module.weight.device.type == "cpu"


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


def test_a_function_that_returns_a_new_tensor_is_refused() -> None:
    module = nn.Linear(2, 3, device="meta")
    with pytest.raises(TypeError, match=r"'weight', by the rule '\*': the function returned a new tensor"):
        materialize_(module, {"*": torch.ones_like})
    materialize_(module, {"*": lambda tensor: tensor.view(-1).fill_(2.0)})
    assert (module.weight == 2).all()
