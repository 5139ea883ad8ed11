"""TensorFlow's MirroredStrategy on two virtual devices."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras_cases.weights import OURS, filled_addresses, functional, inputs

from gpuconst.keras import Constant, Zeros

# Before TensorFlow looks for its devices.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
DEVICES = ["CPU:0", "CPU:1"]


def test_every_replica_is_memory_that_gpuconst_filled() -> None:
    with tf.distribute.MirroredStrategy(DEVICES).scope(), filled_addresses() as filled:
        layer = keras.layers.Dense(4, kernel_initializer=Constant(0.5), bias_initializer=Zeros())
        layer.build((None, 300))
    for weight, value in ((layer.kernel, 0.5), (layer.bias, 0.0)):
        replicas = weight.value.values
        assert [replica.device.rpartition("device:")[2] for replica in replicas] == DEVICES
        for replica in replicas:
            read = np.from_dlpack(replica.read_value())
            assert read.ctypes.data in filled
            assert (read == value).all()


def _trained(initializers: Any) -> list[np.ndarray]:
    with tf.distribute.MirroredStrategy(DEVICES).scope():
        model = functional(initializers)
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    model.fit(inputs(), np.ones((8, 3), "float32"), batch_size=8, verbose=0)
    for weight in model.weights:
        first, second = (replica.numpy() for replica in weight.value.values)
        assert first.tobytes() == second.tobytes()
    return list(model.get_weights())


def test_training() -> None:
    trained = _trained(OURS)
    assert (trained[0] != np.float32(2)).any()
    for weight, twin in zip(trained, _trained(keras.initializers), strict=True):
        np.testing.assert_allclose(weight, twin, rtol=1e-6)  # sums in any order


def test_replicas_do_not_share_what_is_written() -> None:
    with tf.distribute.MirroredStrategy(DEVICES).scope():
        variable = keras.Variable(Constant(0.5), shape=(100, 64))
    first, second = variable.value.values
    first.assign_add(tf.ones((100, 64)))
    assert (first.numpy() == 1.5).all()
    assert (second.numpy() == 0.5).all()


def test_on_the_second_device() -> None:
    with tf.device("CPU:1"), filled_addresses() as filled:
        weight = Constant(0.5)((100, 64))
        variable = keras.Variable(Constant(0.5), shape=(100, 64))
        stock = keras.initializers.Constant(0.5)((100, 64))
    assert weight.device == variable.value.device == stock.device
    assert weight.device.endswith("device:CPU:1")
    for tensor in (weight, variable.value.read_value()):
        assert np.from_dlpack(tensor).ctypes.data in filled
        assert (tensor.numpy() == 0.5).all()
