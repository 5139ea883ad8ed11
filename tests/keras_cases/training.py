"""A step of training after each hand-over: the weights become what they become with Keras' own initializers.

Before it they are the memory that gpuconst filled. On the backends that train.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras_cases.weights import BACKEND, LAYERS, MODELS, OURS, address, as_numpy, filled_addresses, inputs, layer

Build = Callable[[Any], Any]


def _trained(model: Any, x: np.ndarray, **settings: Any) -> list[np.ndarray]:
    """Return the weights after one step on one batch."""
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", **settings)
    y = np.ones(model(x).shape, "float32")
    model.train_on_batch(x, y)
    return [as_numpy(keras.ops.cast(weight.value, "float32")) for weight in model.weights]


def _assert_trains_as_with_keras_own(build: Build, x: np.ndarray, others: list[str], **settings: Any) -> None:
    """Compare a step, ours with settings; before it all but the named others are memory that gpuconst filled."""
    keras.utils.set_random_seed(0)
    with filled_addresses() as filled:
        model = build(OURS)
        model(x)
    assert [weight.name for weight in model.weights if address(weight) not in filled] == others
    before = [as_numpy(weight.value).copy() for weight in model.weights]
    trained = _trained(model, x, **settings)
    keras.utils.set_random_seed(0)
    stock = build(keras.initializers)
    stock(x)
    for weight, twin in zip(trained, _trained(stock, x), strict=True):
        np.testing.assert_allclose(weight, twin, rtol=1e-5, atol=1e-6)
    moved = [(weight != was).any() for weight, was in zip(trained, before, strict=True)]
    assert any(moved)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    _, shape = layer(name, OURS)
    dtype = "int32" if name == "Embedding" else "float32"
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)

    def build(initializers: Any) -> Any:
        return keras.Sequential([keras.Input(shape[1:], dtype=dtype), layer(name, initializers)[0]])

    # Keras puts that bias together from three parts.
    _assert_trains_as_with_keras_own(build, x, ["bias"] if name == "LSTM with unit_forget_bias" else [])


#: The weights with array values, and those that have Keras' own initializers.
OTHERS = {"sequential": ["kernel"], "functional": ["bias"], "subclassed": ["mix", "bias", "bias"]}


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_models(build: Build) -> None:
    _assert_trains_as_with_keras_own(build, inputs(), OTHERS[build.__name__])


def test_a_model_that_its_first_batch_builds() -> None:
    def trained(initializers: Any) -> list[np.ndarray]:
        model = keras.Sequential([keras.layers.Dense(3, kernel_initializer=initializers.Constant(0.1))])
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        model.train_on_batch(inputs(), np.ones((8, 3), "float32"))
        return list(model.get_weights())

    with filled_addresses() as filled:
        ours = trained(OURS)
    assert bool(filled) == (BACKEND != "tensorflow")  # where Keras makes such weights in the graph of the first step
    for weight, twin in zip(ours, trained(keras.initializers), strict=True):
        np.testing.assert_allclose(weight, twin, rtol=1e-5, atol=1e-6)


def _dense(initializers: Any, **settings: Any) -> Any:
    zeros = initializers.Zeros()
    dense = keras.layers.Dense(2, kernel_initializer=initializers.Constant(0.1), bias_initializer=zeros, **settings)
    return keras.Sequential([keras.Input((4,)), dense])


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch's compiler itself does
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_jit_compile(jit_compile: bool) -> None:
    if BACKEND == "torch" and jit_compile and shutil.which("g++") is None:
        pytest.skip("torch compiles with g++, which is not installed")
    _assert_trains_as_with_keras_own(_dense, inputs(), [], jit_compile=jit_compile)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy: str) -> None:
    _assert_trains_as_with_keras_own(lambda made: _dense(made, dtype=policy), inputs(), [])


def _with_lora(initializers: Any) -> Any:
    model = _dense(initializers)
    model.layers[0].enable_lora(2, a_initializer=initializers.Constant(0.5), b_initializer=initializers.Ones())
    return model


def test_with_lora() -> None:
    _assert_trains_as_with_keras_own(_with_lora, inputs(), [])


#: The weights that quantizing adds, and the kernel that it replaces by integers.
QUANTIZED = {
    "int8": ["kernel", "kernel_scale"],
    "int4": ["kernel", "kernel_scale", "kernel_zero", "g_idx"],
    "float8": [f"{part}_{kind}" for part in ("inputs", "kernel", "outputs_grad") for kind in ("scale", "amax_history")],
}


@pytest.mark.parametrize("mode", QUANTIZED)
def test_quantized(mode: str) -> None:
    def build(initializers: Any) -> Any:
        model = _dense(initializers) if mode == "float8" else _with_lora(initializers)  # integers do not train
        model.layers[0].quantize(mode)
        return model

    _assert_trains_as_with_keras_own(build, inputs(), QUANTIZED[mode])
