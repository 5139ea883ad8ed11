"""Models, quantized layers and LoRA have the weights and outputs that Keras' own give. On every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras_cases.weights import MODELS, OURS, as_numpy, inputs

from gpuconst.keras import Constant, Ones, Zeros

# On the backends that do not train.
pytestmark = pytest.mark.filterwarnings("ignore:`custom_gradient` for the:UserWarning")


def _dense(initializers: Any) -> Any:
    layer = keras.layers.Dense(
        3, kernel_initializer=initializers.Constant(0.25), bias_initializer=initializers.Constant([1.0, 2.0, 3.0])
    )
    layer.build((None, 4))
    return layer


def _quantized(mode: str) -> Callable[[Any], Any]:
    def make(initializers: Any) -> Any:
        layer = _dense(initializers)
        layer.quantize(mode)
        return layer

    return make


def _with_lora(initializers: Any) -> Any:
    layer = _dense(initializers)
    layer.enable_lora(2, a_initializer=initializers.Constant(0.5), b_initializer=initializers.Ones())
    return layer


def _quantized_with_lora(initializers: Any) -> Any:
    layer = _quantized("int8")(initializers)
    layer.enable_lora(2, a_initializer=initializers.Constant(0.5), b_initializer=initializers.Ones())
    return layer


def _built_quantized(initializers: Any) -> Any:
    layer = keras.layers.Dense(
        3, dtype="int8_from_float32", kernel_initializer="zeros", bias_initializer=initializers.Constant(0.5)
    )
    layer.build((None, 4))
    return layer


def _assert_as_with_keras_own(build: Callable[[Any], Any]) -> Any:
    ours, stock = build(OURS), build(keras.initializers)
    given, expected = ours(inputs()), stock(inputs())
    assert len(ours.weights) == len(stock.weights) > 0
    for weight, twin in zip(ours.weights, stock.weights, strict=True):
        assert weight.dtype == twin.dtype
        assert as_numpy(weight.value).tobytes() == as_numpy(twin.value).tobytes(), weight.path
    np.testing.assert_array_equal(as_numpy(given), as_numpy(expected))
    return ours


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_models(build: Callable[[Any], Any]) -> None:
    _assert_as_with_keras_own(build)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantized(mode: str) -> None:
    layer = _assert_as_with_keras_own(_quantized(mode))
    assert layer.quantization_mode == mode
    assert as_numpy(layer.bias.value).tolist() == [1, 2, 3]


def test_built_quantized() -> None:
    layer = _assert_as_with_keras_own(_built_quantized)
    assert as_numpy(layer.bias.value).tolist() == [0.5] * 3


def test_with_lora() -> None:
    layer = _assert_as_with_keras_own(_with_lora)
    assert layer.lora_enabled
    assert (as_numpy(layer.kernel) == 0.25 + 2 * 0.5).all()


def test_quantized_with_lora() -> None:
    layer = _assert_as_with_keras_own(_quantized_with_lora)
    assert layer.lora_enabled
    assert keras.backend.standardize_dtype(layer._kernel.dtype) == "int8"


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_policies(policy: str) -> None:
    dense = {"dtype": policy, "kernel_initializer": Constant(0.1), "bias_initializer": Zeros()}
    layer = keras.layers.Dense(4, **dense)
    output = layer(np.ones((2, 3), "float32"))
    made, computed = layer.dtype_policy.variable_dtype, layer.dtype_policy.compute_dtype
    assert keras.backend.standardize_dtype(layer.kernel.value.dtype) == made
    assert keras.backend.standardize_dtype(layer.bias.value.dtype) == made
    assert keras.backend.standardize_dtype(output.dtype) == computed
    assert (as_numpy(keras.ops.cast(layer.kernel.value, "float32")) == as_numpy(Constant(0.1)((1,), made))).all()


def test_the_policy_of_all_layers() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layer = keras.layers.Dense(4, kernel_initializer=Ones())
        layer.build((None, 3))
    finally:
        keras.config.set_dtype_policy("float32")
    assert layer.compute_dtype == "float16"
    assert keras.backend.standardize_dtype(layer.kernel.value.dtype) == "float32"
