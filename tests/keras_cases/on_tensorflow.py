"""What only TensorFlow has: graphs, functions, device scopes, strategies."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_cases.weights import OURS, address, filled_addresses, inputs, sequential

from gpuconst.keras import Constant, Ones, Zeros

TESTS = Path(__file__).parents[1]


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


# AutoGraph complains of a function once in a process, where other tests call these too, and only of calls in a file.
IN_A_FUNCTION = """
import logging, sys
import tensorflow as tf
import gpuconst

logging.getLogger("tensorflow").addHandler(logging.StreamHandler(sys.stdout))

@tf.function
def make():
    made = gpuconst.full(2, 1.5, device="cpu"), gpuconst.ones(2, device="cpu")
    return gpuconst.Constant(0.5)((2,)), *(array.to_tensorflow() for array in made)

print([tensor.numpy().tolist() for tensor in make()])
"""


def test_autograph_leaves_the_code_of_gpuconst_alone(tmp_path: Path, run_python: functools.partial[str]) -> None:
    file = tmp_path / "function.py"
    file.write_text(IN_A_FUNCTION)
    printed = run_python(f"import runpy; runpy.run_path({str(file)!r})", KERAS_BACKEND="tensorflow")
    *complaints, made = printed.splitlines()
    assert made == "[[0.5, 0.5], [1.5, 1.5], [1.0, 1.0]]"
    # On Python 3.14, TensorFlow 2.22 can transform no function, not even this one.
    assert not [line for line in complaints if "could not transform" in line and "<function make at" not in line]


def test_the_value_policy_holds_while_tracing() -> None:
    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def make() -> tf.Tensor:
        return Constant(300)((2,), "int8")

    with pytest.raises(Exception, match="300 does not fit int8") as caught:
        make()
    assert "OverflowError" in f"{caught.type.__name__}: {caught.value}"  # AutoGraph raises its own, or passes it on


@pytest.mark.parametrize("initializer", [Constant(0.5), Constant([0.5, 0.5, 0.5]), Constant(np.float16(0.5))], ids=repr)
def test_a_shape_that_the_graph_knows(initializer: Constant) -> None:
    @tf.function(input_signature=[tf.TensorSpec([None, 3])])  # type: ignore[untyped-decorator, unused-ignore]
    def make(x: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return initializer(tf.shape(x)), initializer((tf.shape(x)[0], 3)), initializer(keras.ops.shape(x))

    for made in make(tf.ones((2, 3))):
        assert made.numpy().tolist() == [[0.5] * 3] * 2


def test_the_dtype_holds_for_a_shape_that_the_graph_knows() -> None:
    @tf.function(input_signature=[tf.TensorSpec([None, 3])])  # type: ignore[untyped-decorator, unused-ignore]
    def make(x: tf.Tensor) -> tf.Tensor:
        return Ones()(tf.shape(x), "int32")

    assert make(tf.ones((2, 3))).dtype == tf.int32


def test_a_shape_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="partially known TensorShape"):
        Constant(0.5)(tf.TensorShape([None, 3]))


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


def _trained_in_a_version_1_graph(initializers: Any) -> list[np.ndarray]:
    v1 = tf.compat.v1
    with tf.Graph().as_default(), filled_addresses() as filled:
        kernel = v1.Variable(initializers.Constant(0.5)((4, 3)), use_resource=True)
        bias = v1.get_variable("bias", shape=(3,), initializer=initializers.Ones())
        loss = tf.reduce_mean((tf.constant(inputs()) @ kernel + bias) ** 2)
        step = v1.train.GradientDescentOptimizer(0.1).minimize(loss)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            before = session.run([kernel, bias])
            session.run(step)
            after = session.run([kernel, bias])
    assert not filled
    return [*before, *after]


def test_training_in_a_version_1_graph() -> None:
    kernel, bias, *after = _trained_in_a_version_1_graph(OURS)
    assert (kernel == 0.5).all()
    assert (bias == 1).all()
    for weight, twin in zip(after, _trained_in_a_version_1_graph(keras.initializers)[2:], strict=True):
        np.testing.assert_allclose(weight, twin, rtol=1e-6)
    assert (after[0] != kernel).any()


def _trained_in_a_function(initializers: Any) -> list[np.ndarray]:
    model, optimizer = sequential(initializers), keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def step(x: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step(tf.constant(inputs()))
    return list(model.get_weights())


def test_training_in_a_function() -> None:
    trained = _trained_in_a_function(OURS)
    assert (trained[0] != np.float32(0.1)).any()
    for weight, twin in zip(trained, _trained_in_a_function(keras.initializers), strict=True):
        np.testing.assert_allclose(weight, twin, rtol=1e-6)


def test_device_scopes() -> None:
    for scope in (tf.device("CPU:0"), keras.device("cpu:0")):
        with scope, filled_addresses() as filled:
            weight = Constant(0.5)((8, 8))
        assert weight.device.endswith("device:CPU:0")
        assert address(weight) in filled


IN_A_CLUSTER = """
    import keras
    import tensorflow as tf
    from gpuconst.keras import Constant
    from keras_cases.weights import filled_addresses

    server = tf.distribute.Server.create_local_server()
    tf.config.experimental_connect_to_host(server.target.removeprefix("grpc://"), "local")
    for device in ("/job:local/task:0/device:CPU:0", "/job:localhost/task:0/device:CPU:0"):
        with tf.device(device), filled_addresses() as filled:
            weight = Constant(0.5)((3,))
        print(weight.device, weight.numpy().tolist(), len(filled))
"""


def test_another_machine_fills_its_own_memory(run_python: functools.partial[str]) -> None:
    there, here = run_python(IN_A_CLUSTER, KERAS_BACKEND="tensorflow", PYTHONPATH=str(TESTS)).splitlines()
    assert there == "/job:local/replica:0/task:0/device:CPU:0 [0.5, 0.5, 0.5] 0"
    assert here == "/job:localhost/replica:0/task:0/device:CPU:0 [0.5, 0.5, 0.5] 1"


def test_jit_compiled() -> None:
    @tf.function(jit_compile=True)  # type: ignore[untyped-decorator, unused-ignore]
    def make(x: tf.Tensor) -> tf.Tensor:
        return x + Constant(0.5)((2,))

    assert make(tf.ones(2)).numpy().tolist() == [1.5, 1.5]


def test_dtypes_are_kept_exactly() -> None:
    for dtype in ("float16", "bfloat16", "float64", "int64", "uint16", "uint64", "complex128", "bool"):
        assert Ones()((2,), dtype).dtype.name == dtype
