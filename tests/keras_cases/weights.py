"""What the cases ask of weights, in the words of each backend."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

import gpuconst.keras
from gpuconst.keras import FILLED

BACKEND = keras.config.backend()


def as_numpy(tensor: Any) -> np.ndarray:
    if BACKEND == "tensorflow":  # where Keras' own way fails for a bfloat16 without dimensions
        return np.asarray(tensor.numpy())
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def same(given: Any, expected: Any) -> bool:
    """Whether two tensors have one dtype and the same bytes."""
    assert keras.backend.standardize_dtype(given.dtype) == keras.backend.standardize_dtype(expected.dtype)
    first, second = as_numpy(given), as_numpy(expected)
    return first.shape == second.shape and first.tobytes() == second.tobytes()


def address(variable: Any) -> int:
    """Where a weight lies, as its own framework tells it."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    if BACKEND == "torch":
        return int(value.data_ptr())
    if BACKEND == "jax":
        return int(value.unsafe_buffer_pointer())
    import tensorflow as tf

    return int(np.from_dlpack(tf.convert_to_tensor(value)).ctypes.data)


@contextlib.contextmanager
def filled_addresses() -> Iterator[set[int]]:
    """Collect the addresses that the initializers fill."""
    found: set[int] = set()

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg == FILLED and isinstance(record.args, tuple):
                found.add(int(str(record.args[2])))

    log, handler = logging.getLogger("gpuconst"), Collect(logging.DEBUG)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class OwnLayer(keras.layers.Layer):  # type: ignore[misc]
    """A user's layer, with a scale that it adds itself."""

    def __init__(self, initializer: Any) -> None:
        super().__init__()
        self.initializer = initializer

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer=self.initializer)
        self.steps = self.add_weight(shape=(), initializer=self.initializer, dtype="int32", trainable=False)

    def call(self, inputs: Any) -> Any:
        return inputs * self.scale


def layer(name: str, initializers: Any) -> tuple[Any, tuple[int, ...]]:
    """Return a layer with weights by `initializers`, ours or those of Keras, and the shape of its input."""
    constant, zeros, ones = initializers.Constant(0.25), initializers.Zeros(), initializers.Ones()
    cell = {"kernel_initializer": constant, "recurrent_initializer": constant, "bias_initializer": zeros}
    if name == "Dense":
        return keras.layers.Dense(6, kernel_initializer=constant, bias_initializer=zeros), (2, 4)
    if name == "Conv2D":
        return keras.layers.Conv2D(3, 2, kernel_initializer=constant, bias_initializer=ones), (1, 5, 5, 2)
    if name == "LSTM":
        return keras.layers.LSTM(3, unit_forget_bias=False, **cell), (1, 4, 2)
    if name == "LSTM with unit_forget_bias":
        return keras.layers.LSTM(3, unit_forget_bias=True, **cell), (1, 4, 2)
    if name == "GRU":
        return keras.layers.GRU(3, **cell), (1, 4, 2)
    if name == "Embedding":
        return keras.layers.Embedding(7, 5, embeddings_initializer=constant), (2, 3)
    if name == "BatchNormalization":
        return keras.layers.BatchNormalization(
            beta_initializer=zeros,
            gamma_initializer=constant,
            moving_mean_initializer=zeros,
            moving_variance_initializer=ones,
        ), (2, 4)
    assert name == "own layer"
    return OwnLayer(ones), (2, 4)


LAYERS = [
    "Dense",
    "Conv2D",
    "LSTM",
    "LSTM with unit_forget_bias",
    "GRU",
    "Embedding",
    "BatchNormalization",
    "own layer",
]
OURS: Any = gpuconst.keras


class Branches(keras.Model):  # type: ignore[misc]
    """A user's model, with a weight of its own beside those of its layers."""

    def __init__(self, initializers: Any) -> None:
        super().__init__()
        self.first = keras.layers.Dense(3, kernel_initializer=initializers.Constant(0.25))
        self.second = keras.layers.Dense(3, kernel_initializer=initializers.Constant(-0.5), bias_initializer="ones")
        self.mix = self.add_weight(name="mix", shape=(3,), initializer=initializers.Constant([0.1, 0.2, 0.3]))

    def call(self, inputs: Any) -> Any:
        return self.first(inputs) * self.mix + self.second(inputs)


def sequential(initializers: Any) -> Any:
    """Return two layers in a row."""
    constant, zeros, ones = initializers.Constant, initializers.Zeros(), initializers.Ones()
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, kernel_initializer=constant(0.1), bias_initializer=zeros),
            keras.layers.Dense(3, kernel_initializer=constant([[0.5, -0.5, 1.5]]), bias_initializer=ones),
        ]
    )


def functional(initializers: Any) -> Any:
    """Return two branches, and a layer that both use."""
    given = keras.Input((4,))
    shared = keras.layers.Dense(3, kernel_initializer=initializers.Constant(0.1))
    doubled = keras.layers.Dense(4, kernel_initializer=initializers.Constant(2.0), bias_initializer=initializers.Ones())
    return keras.Model(given, keras.layers.add([shared(given), shared(doubled(given))]))


def subclassed(initializers: Any) -> Any:
    """Return a model that makes the weights of its layers when it is called."""
    return Branches(initializers)


MODELS = [sequential, functional, subclassed]


def inputs() -> np.ndarray:
    """Return what the models take: eight rows of four."""
    return np.linspace(-1, 1, 32, dtype="float32").reshape(8, 4)
