"""How Keras makes a weight from an initializer, on the backends that are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases.peers import ITEMSIZE, check_filled
from benchmarks.contest import VALUE, Contender

BACKENDS = ("jax", "torch", "tensorflow")


def _variable(initializer: Callable[..., Any], nbytes: int) -> Callable[[], Any]:
    import keras

    shape = (nbytes // ITEMSIZE,)
    if keras.backend.backend() == "jax":
        # JAX returns before the work is done.
        return lambda: keras.Variable(initializer, shape, "float32").value.block_until_ready()
    return lambda: keras.Variable(initializer, shape, "float32").value


def _gpuconst(nbytes: int) -> Callable[[], Any]:
    import gpuconst

    return _variable(gpuconst.Constant(VALUE), nbytes)


def _stock(nbytes: int) -> Callable[[], Any]:
    import keras

    return _variable(keras.initializers.Constant(VALUE), nbytes)


def _ops_full(nbytes: int) -> Callable[[], Any]:
    import keras

    return _variable(lambda shape, dtype: keras.ops.full(shape, VALUE, dtype), nbytes)


CONTENDERS = [
    Contender("gpuconst.Constant", _gpuconst, ours=True),
    Contender("keras.initializers.Constant", _stock),
    Contender("keras.ops.full", _ops_full),
]


def check_weight(value: Any) -> None:
    """Raise AssertionError unless a weight's value, on any backend, is filled correctly."""
    import keras

    check_filled(keras.ops.convert_to_numpy(value))
