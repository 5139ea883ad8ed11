"""The initializers as objects: config, equality, copies and the registry. On every backend."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
from keras_cases.weights import as_numpy

from gpuconst.keras import Constant, Ones, Zeros

MATRIX = np.arange(6, dtype="float32").reshape(2, 3)


def _instances() -> list[Any]:
    return [
        Constant(),
        Constant(0.5),
        Constant(-0.0),
        Constant(1),
        Constant(True),
        Constant(float("nan")),
        Constant(1 - 2j),
        Constant(MATRIX),
        Constant(MATRIX + 1),
        Constant([1.0, 2.0]),
        Zeros(),
        Ones(),
    ]


def _round_trips(instance: Any) -> dict[str, Any]:
    serialized = keras.initializers.serialize(instance)
    return {
        "from_config": type(instance).from_config(instance.get_config()),
        "clone": instance.clone(),
        "deserialize": keras.initializers.deserialize(serialized),
        "get": keras.initializers.get(serialized),
        "through JSON": keras.initializers.deserialize(json.loads(json.dumps(serialized))),
        "pickle": pickle.loads(pickle.dumps(instance)),
        "copy": copy.copy(instance),
        "deepcopy": copy.deepcopy(instance),
    }


@pytest.mark.parametrize("instance", _instances(), ids=repr)
def test_every_copy_is_equal_and_ours(instance: Any) -> None:
    for way, twin in _round_trips(instance).items():
        assert type(twin) is type(instance), way
        assert twin == instance, way
        assert hash(twin) == hash(instance), way
        assert repr(twin) == repr(instance), way


def test_only_equal_values_are_equal() -> None:
    for first, second in itertools.combinations(_instances(), 2):
        assert first != second
    for instance in _instances():
        assert instance not in (None, 0.5, keras.initializers.Constant(0.5), keras.initializers.Zeros())


@pytest.mark.parametrize(
    "value", [np.float32(0.1), np.complex64(1 + 2j), ml_dtypes.bfloat16(0.5), np.int8(3)], ids=repr
)
def test_numpy_scalars_are_saved_and_compared_as_numbers(value: Any) -> None:
    config = json.loads(json.dumps(Constant(value).get_config()))
    assert Constant.from_config(config) == Constant(value) == Constant(value.item())
    assert Constant(value) != Constant(0.25)


@pytest.mark.parametrize(
    "value",
    [((1, 2), (3, 4)), [[1, 2], [3, 4]], [range(1, 3), range(3, 5)], [np.array([1, 2]), [np.int8(3), 4]]],
    ids=repr,
)
def test_sequences_are_saved_as_lists(value: Any) -> None:
    config = json.loads(json.dumps(Constant(value).get_config()))
    assert config == {"value": [[1, 2], [3, 4]]}
    assert Constant.from_config(config) == Constant(value)
    assert hash(Constant.from_config(config)) == hash(Constant(value))


def test_a_list_of_long_arrays_is_compared_in_full() -> None:
    first, second = np.zeros(2000), np.zeros(2000)
    second[1000] = 1
    assert Constant([first, first]) == Constant([first.copy(), first])
    assert Constant([first, first]) != Constant([first, second])


def test_tensors_are_equal_only_to_themselves() -> None:
    tensor = keras.Variable(MATRIX)
    assert Constant(tensor) == Constant(tensor)
    assert Constant(keras.ops.ones((2, 3))) != Constant(keras.ops.zeros((2, 3)))


def test_hashable_as_keys() -> None:
    assert len({Constant(0.5), Constant(0.5), Constant(1.5), Zeros(), Zeros(), Ones(), Constant(MATRIX)}) == 5


def test_repr() -> None:
    assert repr(Constant(0.5)) == "gpuconst.Constant(0.5)"
    assert repr(Zeros()) == "gpuconst.Zeros()"


def test_config_is_that_of_keras() -> None:
    assert Constant(0.5).get_config() == keras.initializers.Constant(0.5).get_config() == {"value": 0.5}
    assert Constant(MATRIX).get_config() == keras.initializers.Constant(MATRIX).get_config()
    assert Zeros().get_config() == Ones().get_config() == {}


def test_an_empty_config_gives_the_default() -> None:
    assert Constant.from_config({}) == Constant(0.0)
    assert keras.initializers.get("gpuconst>Constant") == Constant(0.0)
    assert keras.initializers.get("gpuconst>Zeros") == Zeros()


def test_keras_own_names_stay_its_own() -> None:
    for name in ("constant", "zeros", "ones", "Zeros", "Ones"):
        found = keras.initializers.get({"class_name": name, "config": {"value": 1.0} if name == "constant" else {}})
        assert not type(found).__module__.startswith("gpuconst")


def test_subclass_of_keras_own() -> None:
    for ours, stock in zip((Constant, Zeros, Ones), ("Constant", "Zeros", "Ones"), strict=True):
        assert issubclass(ours, getattr(keras.initializers, stock))


def test_the_config_of_a_complex_value_is_refused_by_keras_own() -> None:
    config = Constant(1 - 2j).get_config()
    assert config == {"value": {"complex": [1.0, -2.0]}}
    with pytest.raises((TypeError, ValueError, KeyError)):
        keras.initializers.Constant.from_config(config)((2,), "complex64")


@pytest.mark.parametrize("instance", [Constant(0.5), Constant(MATRIX), Zeros(), Ones()], ids=repr)
def test_a_call_adds_no_attribute(instance: Any) -> None:
    before = dir(instance)
    instance((2, 3))
    assert dir(instance) == before


def test_clone_model_keeps_our_classes() -> None:
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, kernel_initializer=Constant(0.5), bias_initializer=Ones())]
    )
    for twin in (keras.models.clone_model(model), keras.models.model_from_json(model.to_json())):
        assert twin.layers[0].kernel_initializer == Constant(0.5)
        assert twin.layers[0].bias_initializer == Ones()
        assert (as_numpy(twin.layers[0].kernel.value) == 0.5).all()


def test_a_model_can_be_copied() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_initializer=Constant(0.5))])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (as_numpy(twin.layers[0].kernel.value) == 0.5).all()
        assert twin.layers[0].kernel_initializer == Constant(0.5)


class Scaled(Constant):  # type: ignore[misc, unused-ignore]
    """A user's subclass."""


def test_a_subclass_is_another_class() -> None:
    assert Scaled(0.5) != Constant(0.5)
    assert type(Scaled(0.5).clone()) is Scaled
