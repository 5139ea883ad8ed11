"""The JAX initializer: JAX's own arrays, in memory that gpuconst filled wherever JAX makes them now and whole."""

import copy
import doctest
import logging
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from no_numbers import NO_NUMBERS

import gpuconst
from gpuconst.dtypes import DTYPES
from gpuconst.jax import constant


@pytest.fixture
def addresses(caplog: pytest.LogCaptureFixture) -> Callable[[], list[int]]:
    """Return the addresses that gpuconst filled since the test began."""
    caplog.set_level(logging.DEBUG, "gpuconst")

    def read() -> list[int]:
        return [record.args[1] for record in caplog.records if record.msg.startswith("array filled")]  # type: ignore

    return read


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_jaxs_own_array_in_memory_that_gpuconst_filled(
    name: str, addresses: Callable[[], list[int]]
) -> None:
    value: Any = True if name == "bool" else 1
    with jax.enable_x64(True):
        made = constant(value)(None, (3, 500), name)
        expected = jax.nn.initializers.constant(value)(jax.random.key(0), (3, 500), name)
        assert addresses() == [made.unsafe_buffer_pointer()]
        assert made.dtype == expected.dtype == DTYPES[name].numpy
        assert np.asarray(made).tobytes() == np.asarray(expected).tobytes()
        assert made.sharding == expected.sharding
        assert made.committed == expected.committed
        assert made.aval == expected.aval


@pytest.mark.parametrize("value", [0.1, -0.0, 2.5, np.float32(0.1), np.array(0.1), 7, float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [None, "float32", jnp.bfloat16, np.dtype("float16"), jnp.complex64])
def test_values_are_what_jax_makes_of_them(value: Any, dtype: Any) -> None:
    made = constant(value)(jax.random.key(0), (5,), dtype)
    expected = jax.nn.initializers.constant(value)(jax.random.key(0), (5,), dtype)
    assert made.dtype == expected.dtype
    assert np.asarray(made).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
@pytest.mark.parametrize("dtype", [None, "int32", "int64", jnp.bfloat16, jnp.complex64, float])
def test_a_complex_number_without_an_imaginary_part(dtype: Any) -> None:
    def make() -> Any:
        return constant(3 + 0j)(None, (2,), dtype)

    assert jax.jit(make)().tolist() == make().tolist() == [3, 3]
    assert jax.jit(make)().dtype == make().dtype


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), [2, 3], (np.int64(2), 3), (1 << 20,)])
def test_shapes(shape: Any, addresses: Callable[[], list[int]]) -> None:
    made = constant(0.5)(None, shape)
    assert addresses() == [made.unsafe_buffer_pointer()]
    assert made.shape == tuple(shape)
    assert (made == 0.5).all()


def test_a_length_for_a_shape_is_jaxs_to_read() -> None:
    assert constant(0.5)(None, 3).tolist() == jax.nn.initializers.constant(0.5)(jax.random.key(0), 3).tolist()


def test_the_dtype_of_the_initializer_is_for_calls_without_one() -> None:
    assert constant(1, "bfloat16")(None, (2,)).dtype == jnp.bfloat16
    assert constant(1, jnp.int8)(None, (2,), jnp.int16).dtype == jnp.int16
    assert constant(1)(None, (2,)).dtype == jnp.float32


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("kind", [bool, int, float, complex])
def test_pythons_own_types_are_the_default_types_of_jax(kind: type, x64: bool) -> None:
    made, given = constant(1, kind), jax.nn.initializers.constant(1, kind)
    with jax.enable_x64(x64):
        assert made(None, (2,)).dtype == given(jax.random.key(0), (2,)).dtype  # and no warning that it is narrowed
    assert made == pickle.loads(pickle.dumps(made)) != constant(1)
    assert len({made, constant(1, jnp.dtype(kind))}) == 1
    assert repr(made) == f"gpuconst.jax.constant(1, dtype={kind.__name__})"


# 64-bit types.


@pytest.mark.parametrize("name", ["int64", "uint64", "float64", "complex128"])
def test_64_bit_types_follow_jaxs_setting(name: str, addresses: Callable[[], list[int]]) -> None:
    with jax.enable_x64(True):
        assert constant(2)(None, (3,), name).dtype == name
        assert constant(2.0)(None, (3,)).dtype == "float64"
    with jax.enable_x64(False):
        assert constant(2.0)(None, (3,)).dtype == "float32"
        assert len(addresses()) == 3
        with pytest.warns(UserWarning, match="Explicitly requested dtype"):
            made = constant(2)(None, (3,), name)
    assert made.dtype == {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}[name]
    assert (made == 2).all()


@pytest.mark.parametrize(
    ("value", "name"), [(2**40, "int64"), (2**63, "uint64"), (1e300, "float64"), (1e300 + 0j, "complex128")]
)
def test_what_the_32_bits_cannot_hold_is_refused(value: Any, name: str) -> None:
    def make() -> Any:
        return constant(value)(None, (3,), name)

    for function in (make, jax.jit(make)):
        with pytest.raises(OverflowError, match=rf"for {name} while 64-bit types are off; enable them: jax.config"):
            function()
    with jax.enable_x64(True):
        assert make().tolist() == [value] * 3


def test_what_64_bits_cannot_hold_either_is_not_told_to_enable_them() -> None:
    with pytest.raises(OverflowError, match=r"does not fit int64 \("):
        constant(2**70)(None, (3,), "int64")


# Memory.


def test_what_is_dropped_is_used_again(run_python: Callable[..., str]) -> None:
    code = """
        import gpuconst.jax
        for _ in range(4):
            gpuconst.jax.constant(0.5)(None, (1 << 26,)).block_until_ready()
        # Not getrusage: its peak is inherited from the process that starts this one.
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(int(status["VmHWM"].split()[0]) // 1024)
    """
    assert int(run_python(code)) < 256 + 224  # one is 256 MiB, and JAX some 160


def test_a_jaxlib_without_the_short_way(run_python: Callable[..., str]) -> None:
    code = """
        import jax, logging, sys
        from jaxlib import xla_client
        put = xla_client.batched_device_put
        del xla_client.batched_device_put
        import gpuconst.jax
        xla_client.batched_device_put = put  # JAX's own way needs it too
        logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(msg)s at %(args)s")
        logging.getLogger("jax").setLevel(logging.WARNING)
        made = gpuconst.jax.constant(0.5)(None, (3, 500))
        assert (made == 0.5).all() and not made.committed
        print(made.unsafe_buffer_pointer())
    """
    *_, filled, address = run_python(code).splitlines()
    assert filled == f"array filled by %s on cpu at %#x at ('numpy', {address})"


def test_jaxs_guard_against_transfers_is_heard() -> None:
    for initializer in (constant(0.5), jax.nn.initializers.constant(0.5)):
        with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            initializer(jax.random.key(0), (3,))


# While JAX traces.


def test_jit(addresses: Callable[[], list[int]]) -> None:
    jitted = jax.jit(lambda: constant(0.5)(None, (3,)))
    assert jitted().tolist() == [0.5] * 3
    assert "0.5" in str(jax.make_jaxpr(lambda: constant(0.5)(None, (3,)))())
    assert addresses() == []


def test_the_initializer_itself_is_transformed() -> None:
    made = jax.jit(constant(0.5), static_argnums=(1, 2))(jax.random.key(0), (2, 3), jnp.dtype("bfloat16"))
    assert made.dtype == jnp.bfloat16
    assert (made == 0.5).all()
    assert jax.vmap(constant(0.5), in_axes=(0, None))(jax.random.split(jax.random.key(0), 4), (2,)).shape == (4, 2)


def test_eval_shape_makes_nothing() -> None:
    shape = jax.eval_shape(lambda: constant(0.5)(None, (1 << 45,), jnp.bfloat16))
    assert (shape.shape, shape.dtype) == ((1 << 45,), jnp.bfloat16)


def test_vmap_and_scan() -> None:
    made = jax.vmap(lambda key: constant(0.5)(key, (2,)))(jax.random.split(jax.random.key(0), 3))
    assert made.tolist() == [[0.5, 0.5]] * 3
    _, stacked = jax.lax.scan(lambda carry, _: (carry, constant(2.0)(None, (2,))), 0, length=3)
    assert stacked.tolist() == [[2, 2]] * 3


def test_the_gradient_with_respect_to_the_value() -> None:
    assert jax.grad(lambda value: constant(value)(None, (3,)).sum())(2.0) == 3
    assert jax.grad(lambda x: (constant(0.5)(None, (3,)) * x).sum())(2.0) == 1.5
    assert jax.jit(lambda value: constant(value)(None, (3,)))(0.5).tolist() == [0.5] * 3
    assert jax.vmap(lambda value: constant(value)(None, (2,)))(jnp.arange(2.0)).tolist() == [[0, 0], [1, 1]]


def test_a_concrete_array_within_a_trace() -> None:
    @jax.jit
    def function() -> Any:
        with jax.ensure_compile_time_eval():
            return jnp.ones(int(constant(3)(None, (), jnp.int32)))

    assert function().tolist() == [1, 1, 1]


def test_imported_while_tracing(run_python: Callable[..., str]) -> None:
    code = """
        import jax, logging, sys

        @jax.jit
        def function():
            import gpuconst.jax
            return gpuconst.jax.constant(0.5)(None, (3,))

        print(function().tolist())
        logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s %(msg)s")
        sys.modules["gpuconst"].jax.constant(0.5)(None, (3,))
    """
    printed = run_python(code)
    assert printed.startswith("[0.5, 0.5, 0.5]")
    assert "gpuconst array filled" in printed


# Array values are JAX's to broadcast.


@pytest.mark.parametrize("convert", [np.array, jnp.array])
def test_array_values_are_broadcast(convert: Callable[..., Any]) -> None:
    made = constant(convert([1.0, 2.0]))(None, (3, 2))
    assert made.tolist() == [[1, 2]] * 3
    with pytest.raises(ValueError, match="[Ii]ncompatible shapes|broadcast"):
        constant(convert([1.0, 2.0]))(None, (3,))


@pytest.mark.parametrize("name", ["bool", "int8", "complex64", "bfloat16", "float8_e4m3fn"])
def test_array_values_of_every_kind(name: str) -> None:
    value = np.array([0, 1]).astype(DTYPES[name].numpy)
    made = constant(value)(None, (3, 2), name)
    expected = jax.nn.initializers.constant(value)(jax.random.key(0), (3, 2), name)
    assert made.dtype == expected.dtype
    assert np.asarray(made).tobytes() == np.asarray(expected).tobytes()


# As an object.


class Derived(constant):
    """Somebody's own initializer."""


def test_a_subclass_keeps_its_class() -> None:
    made = Derived(0.5)
    assert type(pickle.loads(pickle.dumps(made))) is type(copy.copy(made)) is Derived
    assert made == Derived(0.5)
    assert made != constant(0.5)


def test_the_example_in_the_documentation() -> None:
    failed, attempted = doctest.testmod(gpuconst.jax)
    assert (failed, attempted > 0) == (0, True)


def test_many_arrays_with_a_traced_length_get_jaxs_own_error() -> None:
    def make(length: Any) -> Any:
        return gpuconst.full_many({"a": ((length,), 1.0, "float32")}, device="cpu")["a"].to_jax()

    with pytest.raises(jax.errors.TracerIntegerConversionError) as caught:
        jax.jit(make)(3)
    assert caught.value.__notes__[0] == "'a'"


@pytest.mark.parametrize("shape", [lambda length: length, lambda length: (length,)], ids=["a length", "a shape"])
def test_a_traced_length_gets_jaxs_own_error(shape: Callable[[Any], Any]) -> None:
    with pytest.raises(jax.errors.TracerIntegerConversionError):
        jax.jit(lambda length: gpuconst.full(shape(length), 1.0, device="cpu").to_jax())(3)


@pytest.mark.parametrize("value", [0.1, -0.0, 3, True, 1j, float("nan"), np.float32(0.1), np.arange(3.0)])
def test_it_pickles_and_is_equal_by_value(value: Any) -> None:
    made = constant(value, jnp.bfloat16)
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), constant(value, "bfloat16")):
        assert again == made
        assert hash(again) == hash(made)
    assert made != constant(value)
    assert made != constant(0.25, jnp.bfloat16)
    assert made != value


def test_what_is_not_equal() -> None:
    values = [0.0, -0.0, 1, True, jnp.array(True), 1.0, np.zeros(3), np.zeros(2), np.zeros(3, "int32"), np.ones(3)]
    values += [np.zeros(3, "int64"), np.zeros((3, 1)), -np.zeros(3)]  # the bytes, the shape, the numbers of another
    made = [constant(value) for value in values]
    assert [[a == b for b in made] for a in made] == np.eye(len(values), dtype=bool).tolist()


def test_arrays_of_both_libraries_are_equal_and_so_are_their_hashes() -> None:
    ours, theirs = constant(np.array([1, 2], "float32")), constant(jnp.array([1.0, 2.0]))
    assert ours == theirs
    assert hash(ours) == hash(theirs)


def test_a_traced_value_equals_only_itself() -> None:
    seen = []

    def function(a: Any, b: Any) -> Any:
        seen.append((constant(a) == constant(a), constant(a) == constant(b), constant(a) == constant(1.0)))
        return a

    jax.jit(function)(1.0, 1.0)
    assert seen == [(True, False, False)]


def test_repr() -> None:
    assert repr(constant(0.5)) == "gpuconst.jax.constant(0.5)"
    assert repr(constant(np.float32(0.5), jnp.bfloat16)) == "gpuconst.jax.constant(0.5, dtype='bfloat16')"
    assert repr(constant(1, "int64")) == "gpuconst.jax.constant(1, dtype='int64')"  # which NumPy calls equal to int


# What does not fit is refused, in every context.


@pytest.mark.parametrize(
    ("value", "dtype", "error"),
    [
        (300, "int8", OverflowError),
        (np.array(300), "int8", OverflowError),
        (1e39, "float32", OverflowError),
        (0.5, "int32", TypeError),
        (1j, None, TypeError),
    ],
)
def test_what_does_not_fit_is_refused(value: Any, dtype: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        constant(value)(None, (3,), dtype)
    with pytest.raises(error):
        jax.jit(lambda: constant(value)(None, (3,), dtype))()


@pytest.mark.parametrize("value", ["1", None, b"\x00", {}, {1, 2}, object(), [1.0, 2.0], *NO_NUMBERS], ids=repr)
def test_what_is_no_value_is_refused_at_once(value: Any) -> None:
    with pytest.raises(TypeError, match="takes a bool, int, float, complex, NumPy scalar or array, not"):
        constant(value)


def test_dtypes_that_only_jax_has() -> None:
    made = constant(3)(None, (2,), jnp.int4)
    assert made.dtype == jnp.int4
    assert made.tolist() == [3, 3]


def test_shapes_that_are_no_shapes() -> None:
    with pytest.raises(Exception, match="appearing in the shapes of the function arguments"):
        constant(0.5)(None, jax.export.symbolic_shape("n, 2"))
    with pytest.raises(TypeError, match="Shapes must be 1D sequences"):
        constant(0.5)(None, (2.5,))
    with pytest.raises(ValueError, match="negative"):
        constant(0.5)(None, (-1,))


def test_a_symbolic_shape_in_an_export() -> None:
    function = jax.jit(lambda x: x + constant(0.5)(None, x.shape))
    exported = jax.export.export(function)(
        jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 2"), jnp.float32)  # type: ignore[no-untyped-call]
    )
    result = exported.call(jnp.ones((3, 2)))  # type: ignore[no-untyped-call]
    assert result.tolist() == [[1.5, 1.5]] * 3


# Several devices.


def test_shards_and_default_devices(run_python: Callable[..., str]) -> None:
    code = """
        import jax, jax.numpy as jnp, gpuconst.jax, logging
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

        filled = []
        class Filled(logging.Handler):
            def emit(self, record):
                if record.msg.startswith("array filled"):
                    filled.append(record)

        logging.getLogger("gpuconst").addHandler(Filled())
        logging.getLogger("gpuconst").setLevel(logging.DEBUG)
        ours, theirs = gpuconst.jax.constant(0.5), jax.nn.initializers.constant(0.5)
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))

        def same(*arguments):
            a, b = ours(None, *arguments), theirs(None, *arguments)
            assert a.sharding == b.sharding and a.committed == b.committed and (a == b).all(), (a.sharding, b.sharding)
            return a

        with jax.set_mesh(mesh):
            a = same((16, 3), jnp.float32, P("x"))
            assert [s.data.shape for s in a.addressable_shards] == [(2, 3)] * 8
            same((16, 3), jnp.float32, NamedSharding(mesh, P(None)))
            same((16, 3), jnp.float32)
            for uneven in ((15, 3), (4, 3)):
                try:
                    ours(None, uneven, jnp.float32, P("x"))
                except ValueError as error:
                    assert "does not evenly divide" in str(error), error
                else:
                    raise AssertionError("uneven shards were made")
            try:
                ours(None, (16,), jnp.float32, P("y"))
            except ValueError as error:
                print(error)
        try:
            ours(None, (16,), jnp.float32, P("x"))
        except ValueError as error:
            assert "jax.set_mesh" in str(error), error
        assert not filled

        a = same((16, 3))
        with jax.default_device(jax.devices()[3]):
            b = same((16, 3))
            assert b.devices() == {jax.devices()[3]}
        with jax.default_device("cpu"):
            same((16, 3))
        assert len(filled) == 3
        # Free to go where other arguments are: 8 shards and a new array in one operation.
        sharded = jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, P("x")))
        assert jax.jit(lambda x, y: x + y)(sharded, a).sharding.spec == P("x", None)

        def in_shards(x):
            return x + ours(None, x.shape)
        mapped = jax.shard_map(in_shards, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        assert (mapped(sharded) == 1.5).all()
    """
    flags = "--xla_force_host_platform_device_count=8"
    assert "axis: y of P('y',) is not found in mesh: ('x',)" in run_python(code, XLA_FLAGS=flags)


# flax: models are built with it, and train.


def test_a_linen_model_trains() -> None:
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")

    def build() -> Any:
        dense = {"kernel_init": constant(0.1), "bias_init": constant(0.0)}
        return nn.Sequential([nn.Dense(4, **dense), nn.relu, nn.Dense(1, param_dtype=jnp.bfloat16, **dense)])

    model, x = build(), jnp.ones((2, 3))
    assert build() == model  # equal by value, so that jit with a module as a static argument compiles once
    assert hash(build().layers[0]) == hash(model.layers[0])
    variables = model.init(jax.random.key(0), x)
    traced = jax.jit(build().init)(jax.random.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(
        lambda a: (a.shape, a.dtype), jax.eval_shape(model.init, jax.random.key(0), x)
    )
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(traced), strict=True):
        assert (ours == theirs).all()
    assert variables["params"]["layers_2"]["kernel"].dtype == jnp.bfloat16

    @jax.jit
    def step(variables: Any) -> Any:
        gradients = jax.grad(lambda v: (model.apply(v, x) ** 2).sum())(variables)
        return jax.tree.map(lambda v, g: v - 0.1 * g, variables, gradients)

    after = step(variables)
    assert all((a != b).all() for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(after), strict=True))


def test_an_nnx_model_trains() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

    class Model(nnx.Module):  # type: ignore[name-defined, misc]
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(3, 4, kernel_init=constant(0.1), bias_init=constant(0.0), rngs=rngs)
            self.norm = nnx.BatchNorm(4, scale_init=constant(1.0), rngs=rngs)
            self.last = nnx.Linear(4, 1, kernel_init=constant(0.2), bias_init=constant(0.5), rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(self.norm(self.first(x)))

    model = Model(nnx.Rngs(0))
    assert (model.last.kernel[...] == 0.2).all()
    shapes = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    assert shapes.first.kernel.shape == (3, 4)
    jitted = nnx.jit(lambda: Model(nnx.Rngs(0)))()
    assert (jitted.first.kernel[...] == model.first.kernel[...]).all()
    x = jax.random.normal(jax.random.key(1), (5, 3))

    @nnx.jit  # type: ignore[untyped-decorator]
    def step(model: Any) -> None:
        gradients = nnx.grad(lambda m: (m(x) ** 2).sum())(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), gradients))

    before = model.last.kernel[...]
    step(model)
    assert (model.last.kernel[...] != before).all()
