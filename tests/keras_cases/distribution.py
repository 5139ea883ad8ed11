"""Keras' distribution on eight devices of JAX: weights in shards and replicas, and a step of training with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from keras_cases.weights import OURS, filled_addresses

from gpuconst.keras import Constant, Zeros

stock = keras.initializers
distribution = keras.distribution

SMALL = (16, 32)
LARGE = (4096, 2048)  # of eight times 32 MiB, from which on Keras makes weights under jit


def _data_parallel() -> Any:
    return distribution.DataParallel()


def _model_parallel(**layouts: tuple[str | None, ...]) -> Any:
    mesh = distribution.DeviceMesh((2, 4), ["batch", "model"])
    layout_map = distribution.LayoutMap(mesh)
    for name, axes in (layouts or {"kernel": (None, "model"), "bias": ("model",)}).items():
        layout_map[f".*{name}"] = axes
    return distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


def _dense(shape: tuple[int, int], initializers: Any = OURS) -> Any:
    dense = keras.layers.Dense(
        shape[1], kernel_initializer=initializers.Constant(0.5), bias_initializer=initializers.Ones()
    )
    dense.build((None, shape[0]))
    return dense


def test_there_are_eight_devices() -> None:
    assert jax.device_count() == 8


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize(("strategy", "parts"), [(_data_parallel, 1), (_model_parallel, 4)])
def test_weights_are_laid_out_as_those_of_keras(
    strategy: Callable[[], Any], parts: int, shape: tuple[int, int]
) -> None:
    with strategy().scope():
        ours, theirs = _dense(shape), _dense(shape, stock)
    for weight, twin in zip(ours.weights, theirs.weights, strict=True):
        assert weight.value.sharding == twin.value.sharding
        assert weight.value.committed == twin.value.committed
        shards = weight.value.addressable_shards
        assert len({shard.device for shard in shards}) == 8
        assert shards[0].data.shape == (*weight.shape[:-1], weight.shape[-1] // parts)
        for shard in shards:
            assert (np.asarray(shard.data) == {"kernel": 0.5, "bias": 1}[weight.name]).all()


def test_the_first_replica_is_the_memory_that_gpuconst_filled() -> None:
    with _data_parallel().scope(), filled_addresses() as filled:
        kernel = _dense(SMALL).kernel.value
    assert kernel.addressable_shards[0].data.unsafe_buffer_pointer() in filled


def test_a_large_weight_is_filled_in_its_shards_by_jax() -> None:
    with _model_parallel().scope(), filled_addresses() as filled:
        _dense(LARGE)
    assert len(filled) == 1  # the bias


def _trained(strategy: Any, initializers: Any) -> tuple[list[np.ndarray], Any]:
    with strategy.scope():
        model = keras.Sequential([keras.Input((16,)), _dense(SMALL, initializers), _dense((32, 4), initializers)])
        model.compile(optimizer=keras.optimizers.SGD(0.001), loss="mse")
        x = np.linspace(-1, 1, 16 * 16, dtype="float32").reshape(16, 16)
        model.fit(x, np.ones((16, 4), "float32"), batch_size=16, verbose=0)
    return [np.asarray(weight) for weight in model.get_weights()], model.layers[0].kernel.value.sharding


@pytest.mark.parametrize("strategy", [_data_parallel, _model_parallel])
def test_training(strategy: Callable[[], Any]) -> None:
    trained, sharding = _trained(strategy(), OURS)
    expected, same = _trained(strategy(), stock)
    assert sharding == same
    assert (trained[0] != 0.5).any()
    for weight, twin in zip(trained, expected, strict=True):
        np.testing.assert_allclose(weight, twin, rtol=1e-6)  # sums in any order


def test_without_a_distribution_weights_go_where_the_inputs_are() -> None:
    mesh = jax.make_mesh((8,), ("batch",))
    rows = NamedSharding(mesh, PartitionSpec("batch"))  # type: ignore[no-untyped-call]
    inputs = jax.device_put(np.ones((8, 16), "float32"), rows)
    dense = _dense(SMALL)
    assert not dense.kernel.value.committed
    assert dense(inputs).sharding.num_devices == 8


def test_under_a_mesh_of_jax() -> None:
    with jax.set_mesh(jax.make_mesh((8,), ("batch",))):
        ours, theirs = Constant(0.5)(SMALL), stock.Constant(0.5)(SMALL)
    assert ours.sharding == theirs.sharding
    assert (ours == 0.5).all()


@pytest.mark.parametrize("scope", [lambda: jax.default_device(jax.devices()[3]), lambda: keras.device("cpu:3")])
def test_on_another_device(scope: Callable[[], Any]) -> None:
    with scope(), filled_addresses() as filled:
        weight = Zeros()((100, 64))
    assert weight.devices() == {jax.devices()[3]}
    assert not weight.committed
    assert weight.unsafe_buffer_pointer() in filled


# What does not fit: the errors are those of JAX and Keras, at the same place and in the same words.


def _error(initializers: Any, shape: tuple[int, int], **layouts: tuple[str | None, ...]) -> Exception:
    with pytest.raises(ValueError, match=".") as caught, _model_parallel(**layouts).scope():
        _dense(shape, initializers)
    return caught.value


@pytest.mark.parametrize(
    ("layouts", "words"),
    [
        ({"kernel": ("model", None)}, "partitioned 4 times, but the dimension size is {length} .*should evenly divide"),
        ({"kernel": ("model", None, None)}, "only valid for values of rank at least 3"),
        ({"kernel": ("rows", None)}, "Invalid axis names for Layout. Valid axis names: .*'rows'"),
    ],
    ids=["uneven", "rank", "axis"],
)
@pytest.mark.parametrize("shape", [(SMALL[0] + 1, SMALL[1]), (LARGE[0] + 1, LARGE[1])], ids=["small", "large"])
def test_layouts_that_do_not_fit(layouts: Any, words: str, shape: tuple[int, int]) -> None:
    error, expected = (_error(initializers, shape, **layouts) for initializers in (OURS, stock))
    assert type(error) is type(expected)
    assert str(error) == str(expected)
    assert re.search(words.format(length=shape[0]), str(error))


@pytest.mark.parametrize("shape", [(3,), (16,)])
def test_a_mesh_of_another_number_of_devices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"does not match the number of devices.*devices.shape=\(8,\)"):
        distribution.DeviceMesh(shape, ["batch"])


def test_a_mesh_of_some_of_the_devices() -> None:
    mesh = distribution.DeviceMesh((4,), ["batch"], devices=distribution.list_devices()[4:])
    with distribution.DataParallel(device_mesh=mesh).scope():
        kernel = keras.Variable(Constant(0.5), shape=SMALL).value
    assert kernel.devices() == set(jax.devices()[4:])
    assert (kernel == 0.5).all()
