"""What only JAX has: tracing, sharding, devices that arrays are not committed to."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras_cases.weights import BACKEND, filled_addresses

from gpuconst.keras import Constant, Ones, Zeros


def test_under_jit() -> None:
    with filled_addresses() as filled:
        made = jax.jit(lambda: (Constant(0.5)((2, 3)), Zeros()((2,)), Ones()((3,), "int32")))()
    assert [array.tolist() for array in made] == [[[0.5] * 3] * 2, [0.0] * 2, [1] * 3]
    assert not filled


def test_eval_shape_makes_nothing() -> None:
    with filled_addresses() as filled:
        shape = jax.eval_shape(lambda: Constant(0.5)((1 << 20, 1 << 20), "bfloat16"))
    assert (shape.shape, shape.dtype) == ((1 << 20, 1 << 20), jnp.bfloat16)
    assert not filled


def test_a_traced_value() -> None:
    made = jax.jit(lambda x: Constant(x)((2, 3)))(0.5)
    assert made.tolist() == [[0.5] * 3] * 2
    assert jax.grad(lambda x: Constant(x)((2, 3)).sum())(0.5) == 6


def test_the_value_policy_holds_while_tracing() -> None:
    with pytest.raises(OverflowError, match="300 does not fit int8"):
        jax.jit(lambda: Constant(300)((2,), "int8"))()


def test_inside_transformed_functions() -> None:
    assert jax.vmap(lambda x: x + Constant(0.5)((2,)))(jnp.ones((3, 2))).tolist() == [[1.5] * 2] * 3
    total, _ = jax.lax.scan(lambda carry, x: (carry + Constant(0.5)(()) * x, None), 0.0, jnp.ones(4))
    assert total == 2


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_64_bits_follow_jax(dtype: str) -> None:
    assert Constant(3)((2,), dtype).dtype == dtype.replace("64", "32")
    with jax.enable_x64(True):
        assert Constant(3)((2,), dtype).dtype == dtype


def test_what_the_32_bits_cannot_hold_is_refused() -> None:
    with pytest.raises(OverflowError, match="does not fit int32"):
        Constant(2**40)((2,), "int64")


def test_arrays_are_uncommitted_as_those_of_keras() -> None:
    for made in (Constant(0.5)((4, 4)), Zeros()((4,)), Constant(np.ones(4))((4,))):
        assert not made.committed
    assert not keras.Variable(Constant(0.5), shape=(4, 4)).value.committed


SHARDED = """
    import jax, keras, numpy as np, warnings
    from gpuconst.keras import Constant, Zeros
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    one, two = jax.devices()
    inputs = jax.device_put(np.ones((4, 8), "float32"), NamedSharding(Mesh([one, two], "x"), P("x")))
    layer = keras.layers.Dense(4, kernel_initializer=Constant(0.5), bias_initializer=Zeros())
    print(layer(inputs).sharding.num_devices)
    for scope in (jax.default_device(two), keras.device("cpu:1")):
        with scope:
            weight = Constant(0.5)((4,))
            print(weight.devices() == {two}, weight.committed)
    for strategy in (keras.distribution.DataParallel(),
                     keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="b") if (
                         mesh := keras.distribution.DeviceMesh((1, 2), ["b", "m"]),
                         layout := keras.distribution.LayoutMap(mesh),
                         layout.__setitem__(".*kernel", (None, "m"))) else None):
        keras.distribution.set_distribution(strategy)
        layer = keras.layers.Dense(4, kernel_initializer=Constant(0.5))
        layer.build((None, 8))
        kernel = layer.kernel.value
        print(kernel.sharding.num_devices, kernel.addressable_shards[0].data.shape, bool((kernel == 0.5).all()))
"""


def test_several_devices(run_python: functools.partial[str]) -> None:
    lines = run_python(SHARDED, KERAS_BACKEND=BACKEND, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert lines.splitlines() == ["2", "True False", "True False", "2 (8, 4) True", "2 (8, 2) True"]


def test_donated_weights_leave_new_ones_alone() -> None:
    initializer = Constant(0.5)
    step: Any = jax.jit(lambda x: x + 1, donate_argnums=0)
    assert step(initializer((256, 256)))[0, 0] == 1.5
    assert (initializer((256, 256)) == 0.5).all()
