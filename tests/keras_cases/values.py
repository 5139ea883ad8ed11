"""Values: those of Keras' own initializers, or an error that says why not. On every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras_cases.weights import BACKEND, as_numpy, same
from no_numbers import NO_NUMBERS

import gpuconst.keras
from gpuconst.keras import Constant, Ones, Zeros

DTYPES = ["bool", "float16", "bfloat16", "float32", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
if BACKEND != "torch":  # where Keras has none
    DTYPES += ["uint64"]
if BACKEND != "openvino":  # where Keras has no complex types, and fills the other with 32 bits of the value
    DTYPES += ["float64", "complex64", "complex128"]
# Where Keras' own Constant has a 32-bit type, or the value of one.
NARROWED = {"tensorflow": ["float64"], "openvino": ["int64", "uint64"]}.get(BACKEND, [])

stock = keras.initializers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 3)])
def test_scalars_are_those_of_keras(dtype: str, shape: tuple[int, ...]) -> None:
    value: Any = {"b": True, "f": 0.1, "c": 0.1}.get(dtype[0], 3)
    if dtype.startswith("complex"):
        value = 0.1 - 2j
    weight = Constant(value)(shape, dtype)
    if dtype in NARROWED:
        assert as_numpy(weight).tobytes() == np.full(shape, value, dtype).tobytes()
    else:
        assert same(weight, stock.Constant(value)(shape, dtype))
    assert same(Zeros()(shape, dtype), stock.Zeros()(shape, dtype))
    assert same(Ones()(shape, dtype), stock.Ones()(shape, dtype))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("initializer", "value"),
    [(Constant(-1.5), -1.5), (Constant(2), 2), (Constant(True), 1), (Constant(3 + 0j), 3), (Zeros(), 0), (Ones(), 1)],
    ids=repr,
)
def test_float8(initializer: Any, value: float, dtype: str) -> None:
    weight = initializer((2, 3), dtype)
    assert keras.backend.standardize_dtype(weight.dtype) == dtype
    assert as_numpy(keras.ops.cast(weight, "float32")).tolist() == [[value] * 3] * 2


@pytest.mark.parametrize(
    "value",
    [1, True, -0.0, float("nan"), float("inf"), np.float16(0.1), np.float64(0.1), np.int8(-3), np.bool_(True)],
    ids=repr,
)
def test_kinds_of_scalar(value: Any) -> None:
    ours = Constant(value)((2, 3))
    assert keras.backend.standardize_dtype(ours.dtype) == "float32"
    assert as_numpy(ours).tobytes() == np.full((2, 3), value, "float32").tobytes()


@pytest.mark.parametrize("value", [np.array(0.5), [0.5], keras.ops.ones(()) / 2, keras.Variable(0.5)], ids=type)
def test_scalars_in_a_wrapping(value: Any) -> None:
    assert as_numpy(Constant(value)((2, 3))).tolist() == [[0.5] * 3] * 2


@pytest.fixture
def half_precision() -> Iterator[None]:
    keras.config.set_floatx("float16")
    yield
    keras.config.set_floatx("float32")


@pytest.mark.usefixtures("half_precision")
def test_the_default_dtype_is_floatx() -> None:
    for weight in (Constant(0.1)(3), Zeros()(3), Ones()(3), Constant([1.0, 2.0, 3.0])(3)):
        assert keras.backend.standardize_dtype(weight.dtype) == "float16"


MATRIX = np.random.default_rng(0).normal(size=(50, 8))


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (MATRIX, (50, 8)),
        (MATRIX.astype("float32"), (50, 8)),
        (MATRIX.tolist(), (50, 8)),
        (MATRIX[::-2, ::3], (25, 3)),
        (keras.ops.convert_to_tensor(MATRIX), (50, 8)),
        (np.eye(3).reshape(3, 3, 1, 1), (3, 3, 1, 4)),
        (np.arange(4), (2, 3, 4)),
        (np.array([[1], [2]], "float32"), (2, 5)),
        (np.array([True, False]), (2,)),
        (range(4), (4,)),
        (np.zeros((0, 3)), (0, 3)),
    ],
    ids=["matrix", "float32", "list", "strided", "tensor", "kernel", "row", "column", "bools", "range", "empty"],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32"])
def test_arrays_are_those_of_keras(value: Any, shape: tuple[int, ...], dtype: str) -> None:
    if BACKEND == "openvino" and (isinstance(value, list | range) or 0 in shape):
        expected = keras.ops.convert_to_tensor(np.broadcast_to(np.asarray(value), shape).astype(dtype))
    else:
        expected = stock.Constant(value)(shape, dtype)
    assert same(Constant(value)(shape, dtype), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bfloat16"])
def test_a_bfloat16_array_becomes_what_was_asked_for(dtype: str) -> None:
    made = Constant(MATRIX.astype("bfloat16"))((50, 8), dtype)
    assert same(made, keras.ops.cast(keras.ops.convert_to_tensor(MATRIX.astype("bfloat16").astype("float32")), dtype))


@pytest.mark.parametrize(
    ("value", "shape"),
    [(np.ones((2, 3)), (3,)), (np.ones((2, 3)), (2, 2)), ([1, 2], ()), ([], (2, 3)), (np.ones((1, 1, 2)), (1, 2))],
)
def test_arrays_of_another_shape_are_refused(value: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"value of shape \(.*\), which does not broadcast to \("):
        Constant(value)(shape)


def _aligned(shape: tuple[int, int]) -> np.ndarray:
    """Return an array at an address that JAX and TensorFlow would take as it is."""
    raw = np.zeros(shape[0] * shape[1] + 16, "float32")
    start = -raw.ctypes.data // 4 % 16
    return raw[start : start + shape[0] * shape[1]].reshape(shape)


@pytest.mark.parametrize("wrap", [np.asarray, keras.ops.convert_to_tensor])
def test_the_callers_array_is_not_the_weight(wrap: Any) -> None:
    given = _aligned((512, 512))
    first, second = (Constant(wrap(given))((512, 512)) for _ in range(2))
    variable = keras.Variable(Constant(wrap(given)), shape=(512, 512))
    variable.assign(keras.ops.ones((512, 512)))
    assert not given.any()
    given[...] = 7
    for weight in (first, second):
        assert not as_numpy(weight).any()
    assert as_numpy(variable.value).min() == as_numpy(variable.value).max() == 1


@pytest.mark.parametrize(
    ("value", "dtype", "error", "words"),
    [
        (300, "int8", OverflowError, r"300 does not fit int8 \(-128 … 127\); to wrap it"),
        (-1, "uint8", OverflowError, "-1 does not fit uint8"),
        (1e10, "float16", OverflowError, "float16"),
        (float("nan"), "int32", OverflowError, "nan does not fit int32"),
        (2, "bool", OverflowError, r"pass bool\(x\)"),
        (0.1, "int32", TypeError, r"0\.1 has a fraction"),
        (1 + 2j, "float32", TypeError, "is complex, float32 is real"),
    ],
)
def test_the_value_policy(value: Any, dtype: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Constant(value)((2, 3), dtype)


@pytest.mark.parametrize("value", [None, "0.1", b"\0\0\0\0", {}, {1, 2}, object(), print, *NO_NUMBERS], ids=repr)
def test_no_number_and_no_array(value: Any) -> None:
    with pytest.raises(TypeError, match="Constant takes a bool, int, float, complex, NumPy scalar or array, not"):
        Constant(value)


@pytest.mark.parametrize("initializer", [Constant(0.5), Constant([1.0]), Zeros(), Ones()], ids=repr)
@pytest.mark.parametrize(
    ("shape", "error", "words"),
    [
        (None, TypeError, r"the shape None, which is not known yet; make the weight in the layer's build\(\)"),
        ((None, 3), TypeError, r"the shape \(None, 3\), which is not known yet.*give every dimension as an int"),
        (keras.Input((3,)).shape, TypeError, r"the shape \(None, 3\), which is not known yet"),
        (keras.KerasTensor((2,)), TypeError, "KerasTensor.*, which is not known yet"),
        ((keras.KerasTensor((), "int32"), 3), TypeError, "KerasTensor.*, which is not known yet"),
        ((2.0,), TypeError, "is an int, not 2.0"),
        ((True,), TypeError, "is an int, not True"),
        ((-1,), ValueError, r"negative dimension \(-1\)"),
        ((2**62, 4), OverflowError, "more than"),
    ],
    ids=["None", "unknown", "input", "symbolic", "symbolic length", "fraction", "bool", "negative", "huge"],
)
def test_shapes_that_are_none(initializer: Any, shape: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        initializer(shape)


@pytest.mark.parametrize("shape", ["23", b"23"])
def test_text_is_no_shape(shape: Any) -> None:
    with pytest.raises(TypeError, match="a shape is an int or a sequence of ints"):
        Constant(0.5)(shape)


def test_a_dtype_that_is_none() -> None:
    with pytest.raises(ValueError, match="float33"):
        Constant(0.5)((2,), "float33")
    with pytest.raises(TypeError, match="string"):
        Zeros()((2,), "string")


def test_the_lazy_names_are_these_classes() -> None:
    assert (gpuconst.Constant, gpuconst.Ones, gpuconst.Zeros) == (Constant, Ones, Zeros)
