"""How each library makes a new array of float32 on the CPU, and a check of the result."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.contest import VALUE, Contender

KIB, MIB, GIB = 2**10, 2**20, 2**30
ITEMSIZE = 4


def check_filled(result: Any, value: float = VALUE) -> None:
    """Raise AssertionError unless all elements of an array of any library are the value, in float32."""
    import numpy as np

    found = np.asarray(result)
    assert found.dtype == np.float32, f"filled with {found.dtype}, expected float32"
    assert found.min() == found.max() == np.float32(value), f"found {found.min()} to {found.max()}, expected {value}"


def gpuconst_full(nbytes: int) -> Callable[[], Any]:
    """Return a function that makes an `Array`."""
    import gpuconst

    return functools.partial(gpuconst.full, (nbytes // ITEMSIZE,), VALUE, dtype="float32", device="cpu")


def numpy_full(nbytes: int) -> Callable[[], Any]:
    """Return a function that makes a NumPy array."""
    import numpy as np

    return functools.partial(np.full, (nbytes // ITEMSIZE,), VALUE, np.float32)


def torch_full(nbytes: int) -> Callable[[], Any]:
    """Return a function that makes a torch tensor."""
    import torch

    return functools.partial(torch.full, (nbytes // ITEMSIZE,), VALUE, dtype=torch.float32)


def torch_empty_fill(nbytes: int) -> Callable[[], Any]:
    """Return a function that makes a torch tensor in two steps."""
    import torch

    shape = (nbytes // ITEMSIZE,)
    return lambda: torch.empty(shape, dtype=torch.float32).fill_(VALUE)


def jax_full(nbytes: int) -> Callable[[], Any]:
    """Return a function that makes a JAX array and waits for it."""
    import jax.numpy as jnp

    shape = (nbytes // ITEMSIZE,)
    return lambda: jnp.full(shape, VALUE, jnp.float32).block_until_ready()


def jax_jitted_full(nbytes: int) -> Callable[[], Any]:
    """Return a function that makes a JAX array by a compiled function and waits for it."""
    import jax
    import jax.numpy as jnp

    compiled = jax.jit(lambda: jnp.full((nbytes // ITEMSIZE,), VALUE, jnp.float32))
    return lambda: compiled().block_until_ready()


def tensorflow_fill(nbytes: int) -> Callable[[], Any]:
    """Return a function that makes a TensorFlow tensor."""
    import tensorflow as tf

    shape = (nbytes // ITEMSIZE,)
    value = tf.constant(VALUE, tf.float32)
    return lambda: tf.fill(shape, value)


def on_threads(contender: Contender) -> list[Contender]:
    """Return a torch contender on one thread, on two, and on all cores if there are more."""
    counts = sorted({1, 2, len(os.sched_getaffinity(0))})
    return [
        replace(contender, name=f"{contender.name}, {count} thread{'s' * (count > 1)}", threads=count)
        for count in counts
    ]


GPUCONST = Contender("gpuconst.full", gpuconst_full, ours=True)
NUMPY = Contender("np.full", numpy_full)
TORCH = on_threads(Contender("torch.full", torch_full))
TORCH_EMPTY = on_threads(Contender("torch.empty().fill_", torch_empty_fill))[-1]
JAX = Contender("jnp.full", jax_full)
JAX_JITTED = Contender("jnp.full, jitted", jax_jitted_full)
TENSORFLOW = Contender("tf.fill", tensorflow_fill)
