"""What only TensorFlow has: graphs, functions, device scopes, strategies."""

from __future__ import annotations

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_cases.weights import address, filled_addresses

from gpuconst.keras import Constant, Ones, Zeros


@pytest.mark.parametrize("device", [None, "CPU:0"])
def test_inside_a_function(device: str | None) -> None:
    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def make() -> tuple[tf.Tensor, ...]:
        with tf.device(device):
            return Constant(0.5)((2, 3)), Zeros()((2,)), Ones()((3,), "int32"), Constant([1.0, 2.0])((2, 2))

    with filled_addresses() as filled:
        made = make()
    assert [tensor.numpy().tolist() for tensor in made] == [[[0.5] * 3] * 2, [0.0] * 2, [1] * 3, [[1.0, 2.0]] * 2]
    assert not filled


def test_a_traced_value() -> None:
    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def make(x: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return Constant(x)((2,)), Constant(2 * x)((2,)), Constant(0.5)((2,))

    assert [tensor.numpy().tolist() for tensor in make(tf.constant(1.5))] == [[1.5] * 2, [3.0] * 2, [0.5] * 2]


def test_the_value_policy_holds_while_tracing() -> None:
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # AutoGraph logs an error of the function it reads

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def make() -> tf.Tensor:
        return Constant(300)((2,), "int8")

    with pytest.raises(Exception, match="OverflowError: 300 does not fit int8"):  # AutoGraph raises its own
        make()


def test_a_variable_made_inside_a_function() -> None:
    kept: list[keras.Variable] = []

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def use() -> tf.Tensor:
        if not kept:
            kept.append(keras.Variable(Constant(0.5), shape=(8, 8)))
        return kept[0].value + 1

    assert (use().numpy() == 1.5).all()
    assert (kept[0].numpy() == 0.5).all()


def test_a_version_1_graph() -> None:
    with tf.Graph().as_default():
        made = [Constant(0.5)((2, 3)), Zeros()((2,)), Constant(np.eye(2))((2, 2))]
        with tf.compat.v1.Session() as session:
            values = session.run(made)
    assert [value.tolist() for value in values] == [[[0.5] * 3] * 2, [0.0] * 2, [[1.0, 0.0], [0.0, 1.0]]]


def test_device_scopes() -> None:
    for scope in (tf.device("CPU:0"), keras.device("cpu:0")):
        with scope, filled_addresses() as filled:
            weight = Constant(0.5)((8, 8))
        assert weight.device.endswith("device:CPU:0")
        assert address(weight) in filled


def test_a_mirrored_strategy() -> None:
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        layer = keras.layers.Dense(4, kernel_initializer=Constant(0.5))
        layer.build((None, 3))
    assert (layer.kernel.value.numpy() == 0.5).all()


def test_jit_compiled() -> None:
    @tf.function(jit_compile=True)  # type: ignore[untyped-decorator, unused-ignore]
    def make(x: tf.Tensor) -> tf.Tensor:
        return x + Constant(0.5)((2,))

    assert make(tf.ones(2)).numpy().tolist() == [1.5, 1.5]


def test_dtypes_are_kept_exactly() -> None:
    for dtype in ("float16", "bfloat16", "float64", "int64", "uint16", "uint64", "complex128", "bool"):
        assert Ones()((2,), dtype).dtype.name == dtype
