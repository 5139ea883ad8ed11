"""Saved models load with gpuconst and without it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_cases.weights import BACKEND, MODELS, OURS, as_numpy, inputs

from gpuconst.keras import Constant, Ones, Zeros

stock = keras.initializers
TESTS = Path(__file__).parents[1]


def _model(value: Any = 0.5) -> Any:
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, kernel_initializer=Constant(value), bias_initializer=Ones()),
            keras.layers.Dense(2, kernel_initializer=Zeros(), bias_initializer=Constant([1.0, 2.0])),
        ]
    )
    model.layers[0].kernel.assign(np.arange(12).reshape(4, 3))
    return model


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_with_gpuconst(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    saved = _model()
    saved.save(path)
    loaded = keras.models.load_model(path)
    for weight, twin in zip(saved.weights, loaded.weights, strict=True):
        assert as_numpy(weight.value).tobytes() == as_numpy(twin.value).tobytes()
    first, second = loaded.layers
    assert (first.kernel_initializer, first.bias_initializer) == (Constant(0.5), Ones())
    assert (second.kernel_initializer, second.bias_initializer) == (Zeros(), Constant([1.0, 2.0]))


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), [(OURS, OURS), (OURS, stock), (stock, OURS)], ids=lambda made: made.__name__
)
def test_load_weights(tmp_path: Path, build: Callable[[Any], Any], saved_by: Any, loaded_by: Any) -> None:
    path = tmp_path / "model.weights.h5"
    saved, loaded = build(saved_by), build(loaded_by)
    before = as_numpy(saved(inputs()))
    np.testing.assert_array_equal(as_numpy(loaded(inputs())), before)
    for weight in saved.weights:
        weight.assign(weight.value * 3 + 1)
    saved.save_weights(path)
    loaded.load_weights(path)
    for weight, twin in zip(saved.weights, loaded.weights, strict=True):
        assert as_numpy(weight.value).tobytes() == as_numpy(twin.value).tobytes()
    np.testing.assert_array_equal(as_numpy(loaded(inputs())), as_numpy(saved(inputs())))
    assert (as_numpy(loaded(inputs())) != before).any()
    np.testing.assert_array_equal(as_numpy(build(loaded_by)(inputs())), before)  # a new one is not the loaded one


WITHOUT = """
    import sys, warnings
    sys.path.insert(0, {tests!r})
    from without import hide
    hide("gpuconst")
    import keras
    model = keras.models.load_model({path!r})
    assert not any(name.partition(".")[0] == "gpuconst" for name in sys.modules)
    for layer in model.layers:
        for initializer in (layer.kernel_initializer, layer.bias_initializer):
            print(type(initializer).__module__, type(initializer).__name__, initializer.get_config())
    warnings.simplefilter("ignore")  # Keras' Variable has an __array__ from before NumPy 2
    print(model.layers[0].kernel.numpy().tolist())
"""


def _load_without(run_python: functools.partial[str], path: Path) -> list[str]:
    return run_python(WITHOUT.format(tests=str(TESTS), path=str(path)), KERAS_BACKEND=BACKEND).splitlines()


def test_without_gpuconst(tmp_path: Path, run_python: functools.partial[str]) -> None:
    path = tmp_path / "model.keras"
    _model().save(path)
    module = "keras.src.initializers.constant_initializers"
    assert _load_without(run_python, path) == [
        f"{module} Constant {{'value': 0.5}}",
        f"{module} Ones {{}}",
        f"{module} Zeros {{}}",
        f"{module} Constant {{'value': [1.0, 2.0]}}",
        str(np.arange(12.0).reshape(4, 3).tolist()),
    ]
