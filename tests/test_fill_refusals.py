"""What must not be filled, or lies about itself: a clear error, and not a byte written."""

import ctypes
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import lying_capsules as dlpack
import numpy as np
import pytest
import torch
from lying_capsules import DLPackOnly, Exporter

import gpuconst
from gpuconst.kernels.cuda_driver import driver


def read_only_array() -> np.ndarray:
    x = np.ones(3)
    x.flags.writeable = False
    return x


READ_ONLY: dict[str, Callable[[], Any]] = {
    "NumPy array": read_only_array,
    "view of a read-only NumPy array": lambda: read_only_array()[1:],
    "broadcast NumPy array": lambda: np.broadcast_to(np.ones(1), (2, 3)),
    "bytes": lambda: b"abc",
    "memoryview of bytes": lambda: memoryview(b"abc"),
    "read-only memoryview": lambda: memoryview(bytearray(3)).toreadonly(),
    "read-only mmap": lambda: mmap.mmap(-1, 8, access=mmap.ACCESS_READ),
    "DLPack of a read-only NumPy array": lambda: DLPackOnly(read_only_array()),
    "DLPack with the read-only flag": lambda: Exporter(flags=dlpack.READ_ONLY),
    "__array_interface__": lambda: SimpleNamespace(__array_interface__=read_only_array().__array_interface__),
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_read_only_memory_is_refused(kind: str) -> None:
    x = READ_ONLY[kind]()
    before = x.tobytes() if isinstance(x, np.ndarray) else None
    with pytest.raises(ValueError, match=rf"^cannot fill {type(x).__name__}: it is read-only; fill a copy of it$"):
        gpuconst.fill(x, 7)
    assert before is None or x.tobytes() == before


def test_a_memmap_opened_for_reading_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(8))
    with pytest.raises(ValueError, match="cannot fill memmap: it is read-only"):
        gpuconst.fill(np.memmap(path, mode="r"), 7)


def deleted() -> jax.Array:
    x = jnp.ones(3)
    x.delete()
    return x


@pytest.mark.parametrize("element", [ctypes.c_void_p, ctypes.c_wchar, ctypes.c_longdouble])
def test_buffers_of_no_dtype(element: Any) -> None:
    with pytest.raises(TypeError, match="which is no dtype here|unknown dtype"):
        gpuconst.fill((element * 3)(), 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "bool"])
def test_jax_arrays_are_immutable(dtype: str) -> None:
    x = jnp.ones((2, 3), dtype)
    with pytest.raises(ValueError, match=r"JAX arrays are immutable; .*gpuconst\.full\(\.\.\.\)\.to_jax\(\)"):
        gpuconst.fill(x, 0)
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(deleted, ValueError, "JAX array was deleted", id="deleted"),
        pytest.param(lambda: jnp.ones(3, "int4"), TypeError, "unknown dtype", id="int4"),
        pytest.param(lambda: jax.random.key(0), TypeError, "unknown dtype", id="random key"),
    ],
)
def test_jax_arrays_that_cannot_be_read(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gpuconst.fill(make(), 0)


def test_a_jax_array_on_several_devices_is_told_of_its_parts(run_python: Callable[..., str]) -> None:
    code = """
        import gpuconst, jax, jax.numpy as jnp, numpy as np
        mesh = jax.make_mesh((2,), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        x = jax.device_put(jnp.ones(4), sharding)
        for call in (lambda: gpuconst.fill(x, 0), lambda: gpuconst.shares_memory(x, np.ones(4))):
            try:
                call()
            except ValueError as error:
                print(error)
        assert gpuconst.shares_memory(x.addressable_shards[0].data, x.addressable_shards[0].data)
    """
    printed = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=2").splitlines()
    assert printed == ["the JAX array lies on 2 devices, and is immutable; look at x.addressable_shards[i].data"] * 2


def test_a_traced_jax_array_has_no_memory() -> None:
    with pytest.raises(TypeError, match="is being traced and has no memory"):
        jax.jit(lambda x: gpuconst.fill(x, 0))(jnp.ones(3))


@pytest.mark.needs("tensorflow")
def test_tensorflow_tensors_are_immutable() -> None:
    import tensorflow as tf

    message = r"TensorFlow's tensors are immutable; .*gpuconst\.full\(\.\.\.\)\.to_tensorflow\(\)"
    assign = r", and hand it to variable\.assign$"
    for x, way_out in ((tf.ones(3), "$"), (tf.Variable(tf.ones(3)), assign), (tf.ones(3, tf.bfloat16), "$")):
        with pytest.raises(ValueError, match=message + way_out):
            gpuconst.fill(x, 0)
        assert tf.reduce_all(tf.convert_to_tensor(x) == 1)
    for x in (tf.constant("text"), tf.Variable("text"), tf.zeros(3, tf.qint8)):
        with pytest.raises(TypeError, match="unknown dtype"):
            gpuconst.fill(x, 0)
    with pytest.raises(TypeError, match="no array"):
        gpuconst.fill(tf.ragged.constant([[1], [2, 3]]), 0)


@pytest.mark.needs("tensorflow")
def test_a_symbolic_tensorflow_tensor_has_no_memory() -> None:
    import tensorflow as tf

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def traced(x: Any) -> Any:
        return gpuconst.fill(x, 0)

    with pytest.raises(TypeError, match="is symbolic and has no memory"):
        traced(tf.ones(3))


@pytest.mark.needs("keras")
def test_keras_variables_are_sent_to_assign(run_python: Callable[..., str]) -> None:
    code = """
        import keras, gpuconst
        try:
            gpuconst.fill(keras.Variable([1.0, 2.0]), 0)
        except TypeError as error:
            print(error)
    """
    assert "for a Keras variable use variable.assign" in run_python(code, KERAS_BACKEND="jax")


@pytest.mark.parametrize(
    "x", [[1, 2], (1, 2), None, "text", 5, 0.5, {}, object(), np, int, np.ndarray, torch.Tensor], ids=repr
)
def test_what_is_no_array_is_refused(x: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{type(x).__name__} is no array; expected a torch tensor, a NumPy or CuPy"):
        gpuconst.fill(x, 0)


@pytest.mark.parametrize(
    ("x", "way_out"),
    [
        ([np.ones(2), np.ones(2)], "for several arrays use gpuconst.fill_many"),
        ((np.ones(2), np.ones(2)), "for several arrays use gpuconst.fill_many"),
        (torch.nn.Linear(2, 2), "of a module, gpuconst.fill_many(x.parameters(), ...)"),
    ],
    ids=["list", "tuple", "module"],
)
def test_what_holds_arrays_is_sent_to_fill_many(x: Any, way_out: str) -> None:
    with pytest.raises(TypeError, match=rf"is no array; .*; {re.escape(way_out)}$"):
        gpuconst.fill(x, 0)


def test_only_variables_are_sent_to_assign() -> None:
    class Frame:
        def assign(self) -> None:
            """As a table of pandas has it, for something else."""

    with pytest.raises(TypeError, match="Frame is no array.*buffer protocol$"):
        gpuconst.fill(Frame(), 0)


def test_a_placeholder_of_torch_fx_has_no_memory() -> None:
    with pytest.raises(TypeError, match=r"stands for a tensor in a graph of torch\.fx .*use torch\.full_like"):
        torch.fx.symbolic_trace(lambda x: gpuconst.fill(x, 0))


@pytest.mark.parametrize("x", [np.float32(1), np.array(1)[()], np.bool_(True)], ids=repr)
def test_numpy_scalars_are_refused(x: Any) -> None:
    with pytest.raises(TypeError, match="is a NumPy scalar, which is immutable"):
        gpuconst.fill(x, 0)


@pytest.mark.parametrize("dtype", ["O", "S5", "U5", "V3", "M8[s]", "m8[D]", "g", [("a", "f4")]], ids=str)
def test_dtypes_that_are_not_in_the_table_are_refused(dtype: Any) -> None:
    x = np.zeros(3, dtype)
    with pytest.raises(TypeError, match=r"unknown dtype .*the dtypes are bool, int8"):
        gpuconst.fill(x, 0)


def test_a_field_of_a_structured_array_is_the_way_out() -> None:
    fields = np.zeros(3, [("a", "f4"), ("b", "i2")])
    with pytest.raises(TypeError, match=r"such as x\['a'\]; "):
        gpuconst.fill(fields, 1)
    gpuconst.fill(fields["b"], 1)
    assert fields.tolist() == [(0, 1)] * 3


@pytest.mark.parametrize("dtype", ["M8[s]", "m8[D]"])
def test_the_integers_of_dates_and_durations_are_the_way_out(dtype: str) -> None:
    x = np.zeros(3, dtype)
    with pytest.raises(TypeError, match=r"x\.view\('int64'\); "):
        gpuconst.fill(x, 1)
    gpuconst.fill(x.view("int64"), 1)
    assert x.tolist() == np.full(3, 1, dtype).tolist()


@pytest.mark.parametrize("make", [lambda: np.zeros(2, "S3"), lambda: ctypes.create_string_buffer(6)])
def test_the_bytes_of_characters_are_the_way_out(make: Callable[[], Any]) -> None:
    x = make()
    with pytest.raises(TypeError, match=re.escape("take the bytes that characters are, numpy.frombuffer(x, 'uint8')")):
        gpuconst.fill(x, 65)
    gpuconst.fill(np.frombuffer(x, "uint8"), 65)
    assert bytes(x) == b"AAAAAA"


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c16"])
def test_foreign_byte_order_is_refused(dtype: str) -> None:
    x = np.ones(3, dtype)
    with pytest.raises(TypeError, match="is not in this machine's byte order"):
        gpuconst.fill(x, 2)
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("value", "error"),
    [(300, OverflowError), (0.5, TypeError), (None, TypeError), (b"12", ValueError), (np.ones(2), TypeError)],
    ids=str,
)
def test_a_bad_value_leaves_the_array_as_it_was(value: Any, error: type[Exception]) -> None:
    x = np.ones(3, np.int8)
    with pytest.raises(error):
        gpuconst.fill(x, value)
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize("make", [lambda: np.ones(3), lambda: torch.ones(3), lambda: gpuconst.ones(3, device="cpu")])
def test_the_cpu_has_no_streams(make: Callable[[], Any]) -> None:
    x = make()
    with pytest.raises(ValueError, match=r"stream=7 was given, but the memory is on the CPU"):
        gpuconst.fill(x, 0, stream=7)
    assert (np.asarray(x) == 1).all()


def test_what_an_exporter_raises_is_not_hidden() -> None:
    x = DLPackOnly(torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(BufferError, match="require gradient"):
        gpuconst.fill(x, 0)


TRUTHS = {
    "all fields": Exporter(),
    "legacy": Exporter(version=None),
    "no strides, which means C order": Exporter(strides=None),
    "a byte offset": Exporter(shape=(2, 4), byte_offset=16),
    "negative strides": Exporter(strides=(-4, -1), byte_offset=44),
    "a dimension of one with a wild stride": Exporter(shape=(3, 1, 4), strides=(4, 2**60, 1)),
    "pinned host memory": Exporter(device_type=dlpack.CUDA_HOST),
    "a later minor version": Exporter(version=(1, 9)),
    "a flag that does not concern it": Exporter(flags=4),
    "64 dimensions": Exporter(shape=(1,) * 62 + (3, 4), strides=None),
    "no dimensions": Exporter(shape=(), strides=()),
    "no dimensions, no shape": Exporter(shape=None, strides=None),
    "nothing, at no address": Exporter(data=0, shape=(0, 4)),
    "nothing, at a wild address": Exporter(data=8, shape=(3, 0)),
}


@pytest.mark.parametrize("truth", TRUTHS)
def test_a_capsule_that_tells_the_truth_is_filled(truth: str) -> None:
    """The lies below differ from these in one field each, so it is the lie that is refused."""
    x = TRUTHS[truth]
    gpuconst.fill(x, 0.5)
    first = x.byte_offset // 4 if x.strides and x.strides[0] > 0 else 0
    count = 1 if x.shape in ((), None) else int(np.prod(x.shape or ()))
    expected = np.full(48, 0x55, np.uint8).view(np.float32)
    expected[first : first + count] = 0.5
    assert x.memory.tobytes() == expected.tobytes()
    assert (x.guarded[:64] == 0x55).all()
    assert (x.guarded[-64:] == 0x55).all()


LIES: dict[str, tuple[Exporter, type[Exception], str]] = {
    "null": (Exporter(data=0), ValueError, "has shape (3, 4) but its address is null"),
    "null with an offset": (Exporter(data=0, byte_offset=1 << 20), ValueError, "its address is null"),
    "tiny address": (Exporter(data=64), ValueError, "lies at 0x40 … 0x70: no memory is there"),
    "huge address": (Exporter(data=2**63 - 8), ValueError, "no memory is there"),
    "huge offset": (Exporter(byte_offset=2**63), ValueError, "no memory is there"),
    "huge shape": (Exporter(shape=(2**62, 2**62), strides=None), ValueError, "no memory is there"),
    "huge strides": (Exporter(strides=(2**61, 1)), ValueError, "no memory is there"),
    "strides to below zero": (Exporter(strides=(-(2**60), 1)), ValueError, "no memory is there"),
    "negative shape": (Exporter(shape=(-3, 4)), ValueError, "shape (-3, 4): a dimension is negative"),
    "two negative lengths": (Exporter(shape=(-3, -4)), ValueError, "a dimension is negative"),
    "negative ndim": (Exporter(ndim=-1), ValueError, "it has -1 dimensions"),
    "65 dimensions": (Exporter(ndim=65), ValueError, "it has 65 dimensions"),
    "a million dimensions": (Exporter(ndim=10**6), ValueError, "it has 1000000 dimensions"),
    "no shape": (Exporter(shape=None, ndim=2), ValueError, "has 2 dimensions but no shape"),
    "unknown type code": (Exporter(code=99), TypeError, "type code 99 with 32 bits and 1 lanes"),
    "odd width": (Exporter(bits=24), TypeError, "type code 2 with 24 bits"),
    "four bits": (Exporter(code=dlpack.INT, bits=4), TypeError, "type code 0 with 4 bits"),
    "one bit": (Exporter(code=dlpack.BOOL, bits=1), TypeError, "type code 6 with 1 bits"),
    "float4": (Exporter(code=dlpack.FLOAT4, bits=4, flags=4), TypeError, "type code 17 with 4 bits"),
    "vectors": (Exporter(lanes=2), TypeError, "2 lanes"),
    "no lanes": (Exporter(lanes=0), TypeError, "0 lanes"),
    "managed memory": (Exporter(device_type=dlpack.CUDA_MANAGED), TypeError, "CUDA managed memory, expected CPU or"),
    "AMD": (Exporter(device_type=dlpack.ROCM), TypeError, "DLPack device type 10, expected CPU or CUDA"),
    "no such device": (Exporter(device_type=99), TypeError, "DLPack device type 99, expected CPU or CUDA"),
    "two devices": (
        Exporter(says_device=(dlpack.CUDA_HOST, 0)),
        ValueError,
        "is on DLPack device type 3, its tensor 1",
    ),
    "a copy": (Exporter(flags=dlpack.IS_COPIED), BufferError, "Exporter.__dlpack__ answered with a copy"),
    "version 2": (Exporter(version=(2, 0)), BufferError, "is of DLPack 2.x, understood is 1.x"),
    "version 0": (Exporter(version=(0, 8)), BufferError, "is of DLPack 0.x, understood is 1.x"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_capsule_that_lies_is_refused(lie: str) -> None:
    x, error, message = LIES[lie]
    with pytest.raises(error, match=re.escape(message)):
        gpuconst.fill(x, 0.5)
    assert (x.guarded == 0x55).all()


@pytest.mark.skipif(driver().why_not is None, reason="there is a GPU, where the address would be believed")
@pytest.mark.parametrize("version", [(1, 1), None])
def test_cuda_memory_without_a_gpu_is_refused(version: tuple[int, int] | None) -> None:
    x = Exporter(device_type=dlpack.CUDA, version=version)
    with pytest.raises(gpuconst.DeviceUnavailableError, match="cuda:0"):
        gpuconst.fill(x, 0.5)
    assert (x.guarded == 0x55).all()


@pytest.mark.parametrize("answer", [None, 5, b"capsule", np.ones(3)], ids=str)
def test_what_is_no_capsule_is_refused(answer: Any) -> None:
    class Wrong(Exporter):
        def __dlpack__(self, **arguments: Any) -> Any:
            return answer

    with pytest.raises(BufferError, match="is not an unconsumed DLPack capsule"):
        gpuconst.fill(Wrong(), 0.5)


@pytest.mark.parametrize("device", [None, (), "cpu"], ids=str)
def test_what_is_no_dlpack_device_is_refused(device: Any) -> None:
    class Wrong(Exporter):
        def __dlpack_device__(self) -> Any:
            return device

    with pytest.raises(TypeError, match=r"__dlpack_device__\(\) is .*, expected \(type, index\)"):
        gpuconst.fill(Wrong(), 0.5)


@pytest.mark.parametrize("version", [(1, 1), None])
def test_a_consumed_capsule_is_refused(version: tuple[int, int] | None) -> None:
    class Again(Exporter):
        def __dlpack__(self, **arguments: Any) -> Any:
            if not hasattr(self, "capsule"):
                self.capsule = super().__dlpack__(**arguments)
            return self.capsule

    x = Again(version=version)
    taken = torch.from_dlpack(x)  # type: ignore[attr-defined]
    with pytest.raises(BufferError, match="is not an unconsumed DLPack capsule"):
        gpuconst.fill(x, 0.5)
    assert (x.guarded == 0x55).all()
    del taken


def interface(**changes: Any) -> dict[str, Any]:
    """Return an array interface of memory that stays, with changes."""
    return {"version": 3, "shape": (4,), "typestr": "<f4", "data": (MEMORY.ctypes.data, False), **changes}


MEMORY = np.full(16, 0x55, np.uint8)
ARRAY_LIES: dict[str, tuple[Any, type[Exception], str]] = {
    "null": (interface(data=(0, False)), ValueError, "NULL"),
    "tiny address": (interface(data=(64, False)), ValueError, "no memory is there"),
    "negative shape": (interface(shape=(-4,)), ValueError, "negative"),
    "strides of another length": (interface(strides=(4, 4)), ValueError, "strides"),
    "unknown type": (interface(typestr="nonsense"), TypeError, "nonsense"),
    "dates": (interface(typestr="<M8[s]"), TypeError, "unknown dtype"),
    "foreign byte order": (interface(typestr=">f4"), TypeError, "byte order"),
    "no type": ({"version": 3, "shape": (4,)}, ValueError, "typestr"),
    "no dict": (5, ValueError, "dict"),
}


@pytest.mark.parametrize("lie", ARRAY_LIES)
def test_an_array_interface_that_lies_is_refused(lie: str) -> None:
    said, error, message = ARRAY_LIES[lie]
    with pytest.raises(error, match=message):
        gpuconst.fill(SimpleNamespace(__array_interface__=said), 0.5)
    assert (MEMORY == 0x55).all()


CUDA_LIES: dict[str, tuple[Any, type[Exception], str]] = {
    "no data": ({"version": 3, "shape": (4,), "typestr": "<f4"}, TypeError, "cannot be read: KeyError"),
    "no dict": (None, TypeError, "cannot be read"),
    "unknown type": (interface(typestr="nonsense"), TypeError, "cannot be read: .*nonsense"),
    "no type": (interface(typestr=None), TypeError, "cannot be read: .*unknown dtype None"),
    "unknown dtype": (interface(typestr="<M8[s]"), TypeError, "cannot be read: .*unknown dtype"),
    "shape of no ints": (interface(shape=("a",)), TypeError, "cannot be read"),
    "address of no int": (interface(data=("a", False)), TypeError, "cannot be read"),
    "strides of another length": (interface(shape=(0,), strides=(4, 4)), ValueError, "their lengths differ"),
    "masked": (interface(mask=object()), TypeError, "masked; fill its data and its mask"),
}


@pytest.mark.parametrize("lie", CUDA_LIES)
def test_a_cuda_interface_that_lies_is_refused(lie: str) -> None:
    said, error, message = CUDA_LIES[lie]
    with pytest.raises(error, match=message):
        gpuconst.fill(SimpleNamespace(__cuda_array_interface__=said), 0.5)
    assert (MEMORY == 0x55).all()


def test_host_memory_that_says_it_is_cuda_memory_is_refused() -> None:
    """Without a GPU because there is none; with one because the driver knows the address."""
    x = SimpleNamespace(__cuda_array_interface__=interface())
    with pytest.raises((gpuconst.DeviceUnavailableError, ValueError), match="says that it is in CUDA memory, but"):
        gpuconst.fill(x, 0.5)
    assert (MEMORY == 0x55).all()
