"""How JAX makes a constant array: with an initializer, as flax does for each parameter, and without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.cases import peers
from benchmarks.cases.peers import ITEMSIZE
from benchmarks.contest import VALUE, Contender


def _initialized(initializer: Callable[..., Any], nbytes: int) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    key, shape = jax.random.key(0), (nbytes // ITEMSIZE,)
    return lambda: initializer(key, shape, jnp.float32).block_until_ready()


def _gpuconst(nbytes: int) -> Callable[[], Any]:
    import gpuconst

    return _initialized(gpuconst.jax.constant(VALUE), nbytes)


def _stock(nbytes: int) -> Callable[[], Any]:
    import jax

    return _initialized(jax.nn.initializers.constant(VALUE), nbytes)


CONTENDERS = [
    Contender("gpuconst.jax.constant", _gpuconst, ours=True),
    Contender("jax.nn.initializers.constant", _stock),
    peers.JAX,
    # Compiled beforehand for its one shape; an initializer gets the shape with each call.
    dataclasses.replace(peers.JAX_JITTED, beside=True),
]
