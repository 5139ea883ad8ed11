"""Layers and models behave as with Keras' own initializers. On every backend."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras_cases.weights import LAYERS, OURS, as_numpy, layer, same

from gpuconst.keras import Constant, Ones, Zeros


def _called(name: str, initializers: Any) -> tuple[Any, Any]:
    built, shape = layer(name, initializers)
    inputs = np.ones(shape, "int32" if name == "Embedding" else "float32")
    return built, built(inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_and_outputs_are_those_of_keras(name: str) -> None:
    ours, output = _called(name, OURS)
    stock, expected = _called(name, keras.initializers)
    assert len(ours.weights) == len(stock.weights) > 0
    for weight, twin in zip(ours.weights, stock.weights, strict=True):
        assert same(weight.value, twin.value), weight.path
        assert weight.trainable == twin.trainable
    np.testing.assert_array_equal(as_numpy(output), as_numpy(expected))


def test_layers_that_copy_their_initializers() -> None:
    attention = keras.layers.MultiHeadAttention(2, 4, kernel_initializer=Constant(0.1), bias_initializer=Ones())
    attention.build((None, 3, 8), (None, 3, 8))
    kernels = [weight for weight in attention.weights if weight.name == "kernel"]
    assert len(kernels) == 4
    assert all((as_numpy(kernel.value) == np.float32(0.1)).all() for kernel in kernels)


def test_inside_a_stateless_scope() -> None:
    with keras.StatelessScope():
        built = keras.layers.Dense(4, kernel_initializer=Constant(0.5), bias_initializer=Constant([1, 2, 3, 4]))
        built.build((None, 3))
        assert as_numpy(built.kernel.value).tolist() == [[0.5] * 4] * 3
    assert as_numpy(built.kernel.value).tolist() == [[0.5] * 4] * 3
    assert as_numpy(built.bias.value).tolist() == [1, 2, 3, 4]


def test_in_a_device_scope() -> None:
    with keras.device("cpu:0"):
        assert as_numpy(Constant(0.5)((2,))).tolist() == [0.5, 0.5]


def test_by_name_and_as_a_function() -> None:
    for initializer in (Constant(2.0), Constant, Zeros, "gpuconst>Ones"):
        built = keras.layers.Dense(2, kernel_initializer=initializer)
        built.build((None, 2))
        assert type(built.kernel_initializer).__module__ == "gpuconst.keras"
