"""The model of `gpuconst demo`: Keras weights in memory that gpuconst filled, and the proof of it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .backends import select
from .views import view_of

__all__ = ["run"]

_KERAS_BACKENDS = ["tensorflow", "jax", "torch"]


def run(*, backend: str | None, value: float, device: str | None) -> None:
    """Build the model, predict once, and print where its weights live.

    Parameters
    ----------
    backend : str or None
        Keras' backend: ``"tensorflow"``, ``"jax"`` or ``"torch"``; None takes ``KERAS_BACKEND`` or the
        first that is installed.
    value : float
        Value to fill the kernels with.
    device : str or None
        Where to put the weights; None leaves it to Keras.

    Raises
    ------
    ImportError
        If Keras or the backend is not installed.
    DeviceUnavailableError
        If the device cannot be used.
    """
    os.environ["KERAS_BACKEND"] = _keras_backend(backend)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    place = select(device) if device is not None else None

    from . import keras as adapter

    keras = importlib.import_module("keras")  # if it is missing, the adapter has said what to install

    filled = _Filled()
    scope: AbstractContextManager[Any] = nullcontext()
    if place is not None:
        scope = keras.device(place.device.replace("cuda", "gpu"))
    with scope, filled:
        model = keras.Sequential(
            [
                keras.Input((100,)),
                keras.layers.Dense(
                    64,
                    activation="relu",
                    kernel_initializer=adapter.Constant(value),
                    bias_initializer=adapter.Zeros(),
                ),
                keras.layers.Dense(
                    10,
                    activation="softmax",
                    kernel_initializer=adapter.Constant(value),
                    bias_initializer=adapter.Zeros(),
                ),
            ]
        )
        model.compile(optimizer="adam", loss="categorical_crossentropy")
        model.summary()
        # Before the first step: Keras' JAX trainer donates its weights, and gets new ones back.
        weights = [(weight.path, weight.shape, view_of(weight.value).address) for weight in model.weights]
        prediction = model.predict(np.random.default_rng().random((1, 100)), verbose=0)
    print("prediction:", np.array2string(prediction[0], precision=3))
    print(f"weights of Keras' {keras.config.backend()} backend:")
    for path, shape, address in weights:
        filler = filled.buffers.get(address)
        where = f"shares the memory that {filler} filled" if filler else "not in memory that gpuconst filled"
        print(f"  {path} {shape}: {where}")


class _Filled(logging.Handler):
    """Remembers, while it is entered, which buffers the initializers filled, from their log.

    Attributes
    ----------
    buffers : dict of int to str
        For each address, the backend and device that filled the buffer.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.buffers: dict[int, str] = {}
        self._log = logging.getLogger("gpuconst")
        self._level = self._log.level

    def emit(self, record: logging.LogRecord) -> None:
        """Remember one buffer."""
        from .keras import FILLED

        if record.msg == FILLED and isinstance(record.args, tuple):
            backend, device, address = record.args
            self.buffers[int(str(address))] = f"gpuconst's {backend} backend on {device}"

    def __enter__(self) -> None:
        self._level = self._log.level
        self._log.setLevel(logging.DEBUG)
        self._log.addHandler(self)

    def __exit__(self, *_: object) -> None:
        self._log.removeHandler(self)
        self._log.setLevel(self._level)


def _keras_backend(asked: str | None) -> str:
    name = asked or os.environ.get("KERAS_BACKEND")
    if name is not None:
        if name in _KERAS_BACKENDS and importlib.util.find_spec(name) is None:
            raise ImportError(f"Keras' backend {name} is not installed; pip install 'gpuconst[{name}]'")
        return name
    for name in _KERAS_BACKENDS:
        if importlib.util.find_spec(name) is not None:
            return name
    raise ImportError(
        "Keras needs a backend, and none is installed; pip install 'gpuconst[keras,jax]', or with torch or tensorflow"
    )
