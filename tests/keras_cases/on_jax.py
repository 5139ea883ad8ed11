"""What only JAX has: tracing, sharding, devices that arrays are not committed to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras_cases.weights import OURS, filled_addresses, inputs, sequential

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


def test_a_traced_value_equals_only_itself() -> None:
    seen = []

    def function(x: Any) -> Any:
        made = Constant(x)
        seen.extend([made == Constant(x), made == Constant(0.5), Constant(0.5) == made])
        return x

    jax.jit(function)(0.5)
    assert seen == [True, False, False]


def test_the_value_policy_holds_while_tracing() -> None:
    with pytest.raises(OverflowError, match="300 does not fit int8"):
        jax.jit(lambda: Constant(300)((2,), "int8"))()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64", "int32", "bool"])
def test_a_complex_number_without_an_imaginary_part_while_tracing(dtype: str) -> None:
    made = jax.jit(lambda: Constant(1 + 0j)((2,), dtype))()
    assert made.dtype == dtype
    assert made.tolist() == [1, 1]


@pytest.mark.parametrize("value", [0.5, [0.5, 0.5, 0.5]], ids=repr)
def test_a_shape_that_the_export_knows(value: Any) -> None:
    function = jax.jit(lambda x: x + Constant(value)(x.shape))
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 3"), jnp.float32)  # type: ignore[no-untyped-call]
    exported: Any = jax.export.export(function)(rows)
    assert exported.call(jnp.ones((2, 3))).tolist() == [[1.5] * 3] * 2


def test_a_traced_shape_is_refused_by_jax() -> None:
    with pytest.raises(TypeError, match="If using `jit`, try using `static_argnums`"):
        jax.jit(lambda length: Constant(0.5)((length, 3)))(2)


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
    def make() -> Any:
        return Constant(2**40)((2,), "int64")

    for function in (make, jax.jit(make)):
        with pytest.raises(
            OverflowError, match="does not fit int32, which JAX takes for int64 while 64-bit types are off; enable them"
        ):
            function()
    with jax.enable_x64(True):
        assert make().tolist() == [2**40] * 2


def test_arrays_are_uncommitted_as_those_of_keras() -> None:
    for made in (Constant(0.5)((4, 4)), Zeros()((4,)), Constant(np.ones(4))((4,))):
        assert not made.committed
    assert not keras.Variable(Constant(0.5), shape=(4, 4)).value.committed


def test_donated_weights_leave_new_ones_alone() -> None:
    initializer = Constant(0.5)
    step: Any = jax.jit(lambda x: x + 1, donate_argnums=0)
    assert step(initializer((256, 256)))[0, 0] == 1.5
    assert (initializer((256, 256)) == 0.5).all()


def _trained_in_a_stateless_scope(initializers: Any) -> list[np.ndarray]:
    model = sequential(initializers)
    start = [variable.value for variable in model.trainable_variables]

    def loss(values: list[jax.Array]) -> Any:
        with keras.StatelessScope(zip(model.trainable_variables, values, strict=True)):
            return (model(inputs()) ** 2).mean()

    @jax.jit
    def step(values: list[jax.Array]) -> Any:
        return jax.tree.map(lambda value, gradient: value - 0.1 * gradient, values, jax.grad(loss)(values))

    trained = step(start)
    assert all(
        (variable.value == value).all() for variable, value in zip(model.trainable_variables, start, strict=True)
    )
    return [np.asarray(value) for value in trained]


def test_training_in_a_stateless_scope() -> None:
    trained = _trained_in_a_stateless_scope(OURS)
    assert (trained[0] != np.float32(0.1)).any()
    for weight, twin in zip(trained, _trained_in_a_stateless_scope(keras.initializers), strict=True):
        np.testing.assert_allclose(weight, twin, rtol=1e-6)
