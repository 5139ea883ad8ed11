"""What only torch has: meta and fake tensors, dynamo, autograd modes."""

from __future__ import annotations

import io
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras_cases.weights import filled_addresses
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gpuconst.keras import Constant, Ones, Zeros

VALUES = [0.5, 3, True, np.float16(0.5), np.ones((2, 3))]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_keras_meta_device(value: object) -> None:
    with keras.device("meta"), filled_addresses() as filled:
        weight = Constant(value)((2, 3))
        variable = keras.Variable(Constant(value), shape=(2, 3))
    assert weight.is_meta
    assert weight.shape == (2, 3)
    assert weight.dtype == torch.float32
    assert variable._value.is_meta
    assert not filled


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_fake_tensors(value: object) -> None:
    with FakeTensorMode(), filled_addresses() as filled:
        weight = Constant(value)((2, 3), "float16")
        zeros = Zeros()((2, 3))
    assert isinstance(weight, FakeTensor)
    assert isinstance(zeros, FakeTensor)
    assert (weight.shape, weight.dtype) == ((2, 3), torch.float16)
    assert not filled


@pytest.mark.parametrize("dtype", ["int8", "float16", "complex64"])
def test_a_complex_number_without_an_imaginary_part_while_tracing(dtype: str) -> None:
    def make() -> Any:
        return Constant(3 + 0j)((2,), dtype)

    with FakeTensorMode():
        assert make().dtype == getattr(torch, dtype)
    assert torch.compile(make, backend="eager")().tolist() == make().tolist() == [3, 3]


def test_torch_meta_device_is_not_that_of_keras() -> None:
    # Keras names its device in every call, so that torch's default has no say; stock weights are the same.
    with torch.device("meta"):
        assert Constant(0.5)((2, 3)).device == keras.initializers.Constant(0.5)((2, 3)).device


@pytest.mark.parametrize("fullgraph", [True, False])
def test_dynamo(fullgraph: bool) -> None:
    @torch.compile(backend="eager", fullgraph=fullgraph)
    def use(x: torch.Tensor) -> Any:
        return x + Constant(0.5)((2, 3)) + Zeros()((3,)) + Ones()((2, 1)) + Constant([1.0, 2.0, 3.0])((3,))

    assert use(torch.ones(3)).tolist() == [[3.5, 4.5, 5.5]] * 2


def test_dynamo_keeps_the_dtype() -> None:
    made: Any = torch.compile(lambda: Constant(3)((2,), "int8"), backend="eager")()
    assert made.dtype == torch.int8
    assert made.tolist() == [3, 3]


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x + Constant(0.5)((3,))

    exported = torch.export.export(Model(), (torch.ones(3),))
    assert exported.module()(torch.ones(3)).tolist() == [1.5] * 3


@pytest.mark.parametrize("value", [0.5, [0.5, 0.5, 0.5]], ids=repr)
def test_a_shape_that_the_graph_knows(value: object) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x + Constant(value)(x.shape)

    rows = {"x": {0: torch.export.Dim("rows")}}
    exported = torch.export.export(Model(), (torch.ones(2, 3),), dynamic_shapes=rows)
    assert exported.module()(torch.ones(5, 3)).tolist() == [[1.5] * 3] * 5
    compiled = torch.compile(Model(), backend="eager", dynamic=True)
    assert compiled(torch.ones(4, 3)).tolist() == [[1.5] * 3] * 4


def test_functorch() -> None:
    made = torch.func.vmap(lambda x: x + Constant(0.5)((2,)))(torch.ones(3, 2))
    assert made.tolist() == [[1.5] * 2] * 3


def test_inference_mode() -> None:
    with torch.inference_mode():
        assert Constant(0.5)((2, 3)).sum().item() == 3


def test_the_callers_tensor_is_not_the_weight() -> None:
    given = torch.zeros(4, 4)
    variable = keras.Variable(Constant(given), shape=(4, 4))
    row = keras.Variable(Constant(given[0]), shape=(4, 4))
    assert row.value.is_contiguous()
    variable.assign(torch.ones(4, 4))
    assert not given.any()
    given.fill_(7)
    assert variable.value.tolist() == [[1.0] * 4] * 4
    assert row.value.tolist() == [[0.0] * 4] * 4


def test_weights_are_leaves_that_train() -> None:
    variable = keras.Variable(Constant(0.5), shape=(4,))
    value: Any = variable.value
    assert isinstance(value, torch.nn.Parameter)
    assert value.is_leaf
    optimizer = torch.optim.SGD([value], lr=1.0)
    loss: Any = (value * value).sum()
    loss.backward()
    optimizer.step()
    assert value.tolist() == [-0.5] * 4


def test_a_saved_bias_is_as_small_as_that_of_keras() -> None:
    def size(initializer: object) -> int:
        layer = keras.layers.Dense(16, bias_initializer=initializer)
        layer.build((None, 2))
        file = io.BytesIO()
        torch.save(layer.bias.value, file)
        return len(file.getvalue())

    assert size(Zeros()) == size(keras.initializers.Zeros())


@pytest.mark.parametrize(("asked", "given"), [("uint16", torch.int32), ("uint32", torch.int64)])
def test_dtypes_that_keras_widens_on_torch(asked: str, given: torch.dtype) -> None:
    assert Constant(3)((2,), asked).dtype == given
    assert keras.initializers.Constant(3)((2,), asked).dtype == given
    with pytest.raises(OverflowError, match=f"does not fit {asked}"):
        Constant(-1)((2,), asked)
