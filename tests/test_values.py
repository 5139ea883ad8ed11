"""The value policy, as users meet it: what an element of a dtype can hold, and its bytes."""

import enum
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import gpuconst
from gpuconst.dtypes import DTYPES
from gpuconst.values import encode, encode_each

INTEGERS = [name for name, row in DTYPES.items() if row.numpy.kind in "iu"]
COMPLEX = ["complex64", "complex128"]
FLOATS = [name for name in DTYPES if name not in [*INTEGERS, *COMPLEX, "bool"]]
FLOAT8 = [name for name in FLOATS if name.startswith("float8")]
WITHOUT_INFINITY = [name for name in FLOAT8 if "fn" in name]
WITHOUT_NEGATIVE_ZERO = [name for name in FLOAT8 if name.endswith("fnuz")]
#: No array of this many elements can be allocated, so an error other than that comes from before.
TOO_MANY = 2**58


def limits(dtype: str) -> Any:
    return ml_dtypes.finfo(DTYPES[dtype].numpy)  # type: ignore[no-untyped-call]


def element(value: Any, dtype: Any) -> bytes:
    """Return the bytes that gpuconst fills with."""
    return gpuconst.full((), value, dtype=dtype, device="cpu").to_numpy().tobytes()


def numpy_element(value: Any, dtype: str) -> bytes:
    """Return the bytes that NumPy or ml_dtypes make of a value that fits."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:  # ml_dtypes take no such int
        value = float(value)
    with np.errstate(all="ignore"):
        return np.asarray(value).astype(DTYPES[dtype].numpy).tobytes()


def refusal(value: Any, dtype: Any) -> str:
    """Return the message with which a value is refused."""
    with pytest.raises((OverflowError, TypeError, ValueError)) as caught:
        gpuconst.full(TOO_MANY, value, dtype=dtype, device="cpu")
    return str(caught.value)


def error_of(value: complex, dtype: str) -> type[Exception] | None:
    """Return which error the policy asks for, decided from the value and what NumPy makes of it."""
    if isinstance(value, complex) and dtype not in COMPLEX:
        if value.imag != 0:
            return TypeError
        value = value.real
    if dtype == "bool" or dtype in INTEGERS:
        if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
            return TypeError
        low, high = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        return None if low <= value.real <= high else OverflowError
    try:
        rounded = np.frombuffer(numpy_element(value, dtype), DTYPES[dtype].numpy)
    except OverflowError:  # beyond float64
        return OverflowError
    kept = rounded.astype(np.complex128)[0]
    if dtype == "float8_e8m0fnu" and value.real < 2.0**-127:
        return OverflowError
    for given_part, kept_part in [(value.real, kept.real), (value.imag, kept.imag)]:
        finite = isinstance(given_part, int) or math.isfinite(given_part)
        same = math.isfinite(kept_part) if finite else np.array_equal(given_part, kept_part, equal_nan=True)
        if not same:
            return OverflowError
    return None


PARTS = st.one_of(st.floats(), st.floats(width=32), st.floats(width=16), st.floats(-20, 20, width=16))
NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-300, 300),
    st.integers(-(2**70), 2**70),
    PARTS,
    PARTS.map(np.float64),
    st.builds(complex, PARTS, PARTS),
    st.builds(complex, PARTS, st.just(0.0)),
    # Where each dtype ends, and a step beyond.
    st.builds(
        lambda name, factor: float(limits(name).max) * factor,
        st.sampled_from(FLOATS),
        st.sampled_from([-1.0, 1.0, 1.0 + 2.0**-53, 1.03, 1.0625, 1.1, 2.0, 0.5]),
    ),
    st.builds(lambda bits, step: 2**bits + step, st.sampled_from([7, 8, 15, 16, 31, 32, 63, 64]), st.integers(-2, 1)),
    # Where each dtype becomes subnormal, and where it underflows.
    st.builds(
        lambda name, factor: float(limits(name).smallest_subnormal) * factor,
        st.sampled_from(FLOATS),
        st.sampled_from([-1.0, 1.0, 0.5, 0.49, 0.51, 1.5, 3.0]),
    ),
)


def elements(dtype: str) -> st.SearchStrategy[bytes]:
    """Return all bytes that an element can be: nans with any payload, subnormals, every float8."""
    itemsize = DTYPES[dtype].itemsize
    return st.sampled_from([b"\0", b"\1"]) if dtype == "bool" else st.binary(min_size=itemsize, max_size=itemsize)


@given(NUMBERS, st.sampled_from(list(DTYPES)))
@example(2**53 + 1, "int64")
@example(2**1024, "float64")
@example(10**400, "complex64")
@example(2**64, "bfloat16")  # ints that NumPy holds as objects
@example(-(2**63) - 1, "bfloat16")
@example(2**-127, "float8_e8m0fnu")
@example(2**63 + 2**39 + 1, "float32")  # by way of a float64 it would be rounded twice
def test_any_number_into_any_dtype(value: complex, dtype: str) -> None:
    expected = error_of(value, dtype)
    if expected is None:
        real = value.real if isinstance(value, complex) and dtype not in COMPLEX else value
        assert element(value, dtype) == numpy_element(real, dtype)
    else:
        with pytest.raises(expected):
            gpuconst.full(TOO_MANY, value, dtype=dtype, device="cpu")


@given(st.data(), st.sampled_from(list(DTYPES)))
def test_a_numpy_scalar_of_the_dtype_is_copied_by_its_bytes(data: st.DataObject, dtype: str) -> None:
    bits = data.draw(elements(dtype))
    scalar = np.frombuffer(bits, DTYPES[dtype].numpy)[0]
    assert element(scalar, dtype) == bits
    assert element(np.asarray(scalar), dtype) == bits


def test_the_payload_of_a_nan_is_kept() -> None:
    bits = b"\x01\x00\xa0\x7f"
    scalar = np.frombuffer(bits, np.float32)[0]
    assert element(scalar, "float32") == bits
    assert element(np.asarray(scalar), "float32") == bits


@given(st.data(), st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES)))
def test_a_numpy_scalar_of_another_dtype_counts_as_its_number(data: st.DataObject, source: str, dtype: str) -> None:
    assume(source != dtype)
    bits = data.draw(elements(source))
    scalar = np.frombuffer(bits, DTYPES[source].numpy)[0]
    number = scalar.item() if DTYPES[source].native else float(scalar)
    expected = error_of(number, dtype)
    if expected is not None:
        with pytest.raises(expected):
            element(scalar, dtype)
        return
    found = np.frombuffer(element(scalar, dtype), DTYPES[dtype].numpy)
    real = number.real if isinstance(number, complex) and dtype not in COMPLEX else number
    if number == number:  # of a nan from elsewhere, only that it stays one
        assert found.tobytes() == numpy_element(real, dtype)
    else:
        assert np.isnan(found.astype(np.complex128)).all()


@given(st.data(), st.sampled_from(list(DTYPES)))
def test_bytes_are_the_bits(data: st.DataObject, dtype: str) -> None:
    bits = data.draw(elements(dtype))
    assert element(bits, dtype) == bits


@pytest.mark.parametrize("value", [b"", b"\1", b"\1" * 3, b"\1" * 5])
def test_bytes_of_another_length(value: bytes) -> None:
    with pytest.raises(ValueError, match=f"has {len(value)} bytes, one float32 element has 4"):
        gpuconst.full(2, value, dtype="float32", device="cpu")


def test_bytes_without_a_dtype() -> None:
    with pytest.raises(TypeError, match="give the dtype"):
        gpuconst.full(2, b"\0\0\0\0", device="cpu")


# The rows of the table in which the peers disagree. What must not be lost is said in the message: the
# value, the dtype, and what it holds.
@pytest.mark.parametrize(
    ("value", "dtype", "error", "says"),
    [
        (300, "int8", OverflowError, "300 does not fit int8 (-128 … 127)"),
        (-129, "int8", OverflowError, "-129 does not fit int8 (-128 … 127)"),
        (2**63, "int8", OverflowError, "pass a value in that range, or a wider or floating dtype"),
        (-1, "uint8", OverflowError, "-1 does not fit uint8 (0 … 255)"),
        (-1, "uint64", OverflowError, "-1 does not fit uint64 (0 … 18446744073709551615)"),
        (2**64, "uint64", OverflowError, "18446744073709551616 does not fit uint64"),
        (2**63, "int64", OverflowError, "9223372036854775808 does not fit int64"),
        (2**63, None, OverflowError, "pass dtype='uint64'"),
        (-(2**63) - 1, None, OverflowError, "pass a floating dtype"),
        (2**64, None, OverflowError, "pass a floating dtype"),
        (10**400, None, OverflowError, "no dtype holds it"),
        (-(10**400), None, OverflowError, "no dtype holds it"),
        (np.uint64(2**63), None, OverflowError, "pass dtype='uint64'"),
        (300.0, "int8", OverflowError, "300 does not fit int8"),
        (1e10, "float16", OverflowError, "10000000000.0 does not fit float16 (±65504)"),
        (65520, "float16", OverflowError, "65520 does not fit float16 (±65504)"),
        (1e39, "float32", OverflowError, "1e+39 does not fit float32 (±3.40282e+38)"),
        (1e39, None, OverflowError, "float64"),
        (10**400, "float64", OverflowError, "does not fit float64 (±1.79769e+308)"),
        (1e6, "float8_e4m3fn", OverflowError, "1000000.0 does not fit float8_e4m3fn (±448)"),
        (1e39, "complex64", OverflowError, "complex128"),
        (1e39j, "complex64", OverflowError, "1e+39j does not fit complex64"),
        (0.1, "int32", TypeError, "0.1 has a fraction, int32 holds whole numbers"),
        (math.nan, "int32", OverflowError, "nan does not fit int32"),
        (math.inf, "int32", OverflowError, "inf does not fit int32"),
        (-math.inf, "uint64", OverflowError, "-inf does not fit uint64"),
        (math.nan, "bool", OverflowError, "nan does not fit bool"),
        (2, "bool", OverflowError, "2 does not fit bool (0 … 1); pass bool(x)"),
        (-1, "bool", OverflowError, "-1 does not fit bool"),
        (0.5, "bool", TypeError, "0.5 has a fraction"),
        (1 + 2j, "float32", TypeError, "(1+2j) is complex, float32 is real"),
        (complex(1, math.nan), "float32", TypeError, "complex"),
        (np.complex64(1j), "int8", TypeError, "is complex, int8 is real"),
        (0, "float8_e8m0fnu", OverflowError, "it has no zero"),
        (-1.0, "float8_e8m0fnu", OverflowError, "powers of two"),
        (1e-40, "float8_e8m0fnu", OverflowError, "from 5.877e-39"),
        (False, "float8_e8m0fnu", OverflowError, "it has no zero"),
        (-0.0, "float8_e8m0fnu", OverflowError, "it has no zero"),
        (math.inf, "float8_e8m0fnu", OverflowError, "powers of two"),
        (math.inf, "float8_e4m3fn", OverflowError, "inf does not fit float8_e4m3fn (±448, without infinity)"),
        (None, "float32", TypeError, "fill_value is None of type NoneType, expected bool, int, float"),
        (None, None, TypeError, "fill_value is None"),
        ("1", "float32", TypeError, "fill_value is '1' of type str"),
        (np.str_("1"), "float32", TypeError, "of type str_"),
        (bytearray(4), "float32", TypeError, "of type bytearray"),
        (np.ma.masked, "float32", TypeError, "a masked element has no value"),
        ([1.0], "float32", TypeError, "of type list"),
        (object, "float32", TypeError, "of type type"),
        (np.datetime64("2020-01-01"), "int64", TypeError, "of type datetime64"),
        (np.timedelta64(5, "ns"), "int64", TypeError, "of type timedelta64"),
        (np.timedelta64(5, "ns"), None, TypeError, "of type timedelta64"),
        (np.array("1"), "float32", TypeError, "of type str_"),
        (np.ones(1), "float32", TypeError, "ndarray of shape (1,), expected a scalar"),
        (np.ones((2, 3)), None, TypeError, "ndarray of shape (2, 3), expected a scalar"),
    ],
    ids=lambda part: f"{part!s:.30}",
)
def test_a_refused_value(value: Any, dtype: str | None, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        gpuconst.full(TOO_MANY, value, dtype=dtype, device="cpu")


def test_no_wider_dtype_is_named_where_none_holds_the_value() -> None:
    with pytest.raises(OverflowError, match=r"does not fit float32 .*; pass a value in that range$"):
        gpuconst.full(2, 10**400, dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", ["int8", "uint64", "float32", "complex128", None])
def test_an_int_that_python_does_not_write_out(dtype: str | None) -> None:
    with pytest.raises(OverflowError, match="an int of 16610 bits does not fit"):
        gpuconst.full(2, 10**5000, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", WITHOUT_INFINITY)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_into_a_format_without_it(value: float, dtype: str) -> None:
    assert repr(value) in refusal(value, dtype)


@pytest.mark.parametrize("dtype", sorted({*FLOATS, *COMPLEX} - {*WITHOUT_INFINITY}))
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_into_a_format_with_it(value: float, dtype: str) -> None:
    found = np.frombuffer(element(value, dtype), DTYPES[dtype].numpy).astype(np.complex128)
    assert found[0].real == value


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX])
def test_nan_into_every_format(dtype: str) -> None:
    found = np.frombuffer(element(math.nan, dtype), DTYPES[dtype].numpy)
    assert np.isnan(found.astype(np.complex128)).all()


@pytest.mark.parametrize("dtype", sorted({*FLOATS} - {*WITHOUT_NEGATIVE_ZERO, "float8_e8m0fnu"}))
def test_negative_zero_is_kept_where_there_is_one(dtype: str) -> None:
    itemsize = DTYPES[dtype].itemsize
    assert int.from_bytes(element(-0.0, dtype), "little") == 1 << 8 * itemsize - 1


@pytest.mark.parametrize("dtype", WITHOUT_NEGATIVE_ZERO)
@pytest.mark.parametrize("value", [-0.0, -1e-30])
def test_negative_zero_is_zero_where_there_is_none(dtype: str, value: float) -> None:
    assert element(value, dtype) == b"\0"  # not 0x80: that is nan


@pytest.mark.parametrize("dtype", COMPLEX)
def test_negative_zeros_of_a_complex_are_kept(dtype: str) -> None:
    found = np.frombuffer(element(complex(-0.0, -0.0), dtype), dtype)
    assert np.signbit(found.real).all()
    assert np.signbit(found.imag).all()


@pytest.mark.parametrize("dtype", sorted({*FLOATS} - {"float8_e8m0fnu"}))
def test_underflow_to_zero_is_silent(dtype: str) -> None:
    smallest = float(limits(dtype).smallest_subnormal)
    assert element(smallest, dtype) != element(0, dtype)
    assert element(smallest / 4, dtype) == element(0, dtype)


@pytest.mark.parametrize(
    ("value", "dtype", "same"),
    [
        (2.0, "int32", 2),
        (-0.0, "int8", 0),
        (1e18, "int64", 10**18),
        (2**53 + 1, "int64", 2**53 + 1),
        (-(2**63), "int64", -(2**63)),
        (2**64 - 1, "uint64", 2**64 - 1),
        (2**53 + 1, "float64", 2.0**53),
        (True, "int8", 1),
        (True, "float8_e8m0fnu", 1),
        (np.True_, "bfloat16", 1),
        (0, "bool", False),
        (1.0, "bool", True),
        (-0.0, "bool", False),
        (3 + 0j, "int16", 3),
        (complex(0.5, -0.0), "float16", 0.5),
        (enum.IntEnum("Level", "LOW HIGH").HIGH, "float32", 2.0),  # type: ignore[attr-defined]
        (np.longlong(7), "int64", 7),
        (ml_dtypes.bfloat16(0.5), "float32", 0.5),
        (np.array(7), "int8", 7),
    ],
)
def test_kinds_that_mean_the_same_number(value: Any, dtype: str, same: Any) -> None:
    assert element(value, dtype) == numpy_element(same, dtype)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (True, "bool"),
        (np.False_, "bool"),
        (1, "int64"),
        (-(2**63), "int64"),
        (2**63 - 1, "int64"),
        (np.int8(1), "int64"),
        (np.uint64(1), "int64"),
        (0.1, "float32"),
        (np.float64(0.1), "float32"),
        (np.float16(0.1), "float32"),
        (ml_dtypes.bfloat16(0.1), "float32"),
        (1j, "complex64"),
        (np.complex128(1j), "complex64"),
        (np.array(0.1), "float32"),
    ],
)
def test_the_dtype_when_none_is_given(value: Any, dtype: str) -> None:
    assert gpuconst.full(1, value, device="cpu").dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("value", [300, -1, 2**40 + 5, -(2**63), 70000.0])
def test_the_hint_to_wrap_wraps(dtype: str, value: float) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if low <= value <= high:
        assert element(value, dtype) == numpy_element(int(value), dtype)
        return
    hint = refusal(value, dtype).partition("to wrap it, pass ")[2]
    wrapped = eval(hint, {"numpy": np})
    assert int.from_bytes(element(wrapped, dtype), "little") == int(value) % 2 ** (8 * DTYPES[dtype].itemsize)


@pytest.mark.parametrize(
    ("value", "dtype", "hint", "follow"),
    [
        (Fraction(1, 4), "float32", "pass float(x)", float),
        (Decimal("0.5"), "float32", "pass float(x)", float),
        (np.longdouble(0.5), "float32", "pass float(x)", float),
        (ml_dtypes.int4(3), "float32", "pass float(x)", float),
        (np.clongdouble(0.5), "complex64", "pass complex(x)", complex),
        (2.4, "int8", "pass round(x)", round),
        (1 + 2j, "float32", "pass its .real", lambda x: x.real),
        (7, "bool", "pass bool(x)", bool),
        (0.5, "bool", "pass bool(x)", bool),
        (1e6, "float8_e4m3fn", "pass a value in that range", lambda _: 448),
        (0, "float8_e8m0fnu", "pass a value in that range", lambda _: 2.0**-127),
    ],
)
def test_the_way_out_that_a_message_names(value: Any, dtype: str, hint: str, follow: Callable[[Any], Any]) -> None:
    assert hint in refusal(value, dtype)
    gpuconst.full(2, follow(value), dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    ("value", "dtype", "wider"),
    [
        (1e10, "float16", "float64"),
        (int(sys.float_info.max), "float32", "float64"),
        (1e39, "complex64", "complex128"),
        (2**63, None, "uint64"),
    ],
)
def test_the_wider_dtype_that_a_message_names(value: Any, dtype: str | None, wider: str) -> None:
    assert wider in refusal(value, dtype)
    assert element(value, wider) == numpy_element(value, wider)


@pytest.mark.parametrize("dtype", ["float64", "int8", "uint64"])
def test_no_wider_dtype_is_named_where_there_is_none(dtype: str) -> None:
    assert refusal(10**400, dtype).endswith("; pass a value in that range")


@pytest.mark.parametrize(
    "scalar", [torch.tensor(0.5), jnp.float32(0.5), jnp.array(0.5)], ids=lambda x: type(x).__name__
)
def test_a_scalar_of_a_framework_is_told_its_way_out(scalar: Any) -> None:
    assert "pass x.item()" in refusal(scalar, "float32")
    gpuconst.full(2, scalar.item(), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "values", [torch.ones(2, 3), jnp.ones((2, 3)), np.ones((2, 3))], ids=lambda x: type(x).__name__
)
def test_many_values_are_not_told_to_be_one(values: Any) -> None:
    message = refusal(values, "float32")
    assert message.startswith(f"fill_value is {type(values).__name__} of shape (2, 3), expected a scalar; ")
    assert "pass" not in message


@pytest.mark.parametrize(
    "value", [float, np.float32, np.datetime64, torch.Tensor, np.datetime64("2020-01-01"), np.void(4), np.str_("1")]
)
def test_a_class_a_date_and_bytes_are_not_told_to_be_converted(value: Any) -> None:
    message = refusal(value, "float32")
    assert "of type" in message
    assert "pass" not in message


@pytest.mark.parametrize("value", [[0.5] * 10**6, "x" * 10**6, {10**5000}], ids=lambda x: type(x).__name__)
def test_a_message_shows_of_a_large_value_its_beginning(value: Any) -> None:
    for message in (refusal(value, "float32"), refusal(1, value)):
        assert len(message) < 700


def test_zeros_of_the_format_without_zero() -> None:
    with pytest.raises(OverflowError, match="it has no zero"):
        gpuconst.zeros(TOO_MANY, dtype="float8_e8m0fnu", device="cpu")


def test_a_value_is_checked_before_the_device_is_looked_at() -> None:
    with pytest.raises(OverflowError):
        gpuconst.full(1, 300, dtype="int8", device="nowhere")


# Many at once

EDGES = st.floats(width=64) | st.sampled_from([0.0, -0.0, 1e-46, 448.0, 464.0, 480.0, 57344.0, 65520.0, 3.4e38])


def one_by_one(values: list[Any], dtype: str) -> bytes | tuple[type[Exception], str]:
    try:
        return b"".join(encode(value, DTYPES[dtype]) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        return type(error), str(error)


def at_once(values: list[Any], dtype: str) -> bytes | tuple[type[Exception], str]:
    try:
        return encode_each(values, DTYPES[dtype])
    except (TypeError, ValueError, OverflowError) as error:
        return type(error), str(error)


@given(
    st.lists(EDGES, max_size=6) | st.lists(st.integers(-300, 2**64), max_size=6) | st.lists(NUMBERS, max_size=6),
    st.sampled_from(list(DTYPES)),
)
@example([1.0, math.inf], "float8_e4m3fn")
@example([1.0, -math.inf], "float8_e5m2fnuz")
@example([1.0, 1e-45], "float8_e8m0fnu")
@example([1.0, 1e39], "float32")
def test_many_at_once_are_encoded_as_one_by_one(values: list[Any], dtype: str) -> None:
    assert at_once(values, dtype) == one_by_one(values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_that_fit_are_encoded_at_once_as_one_by_one(dtype: str) -> None:
    values = [0.1, 1.0, 1.5, 2.0, 3.0, 0.3, math.nan]
    assert at_once(values, dtype) == one_by_one(values, dtype)
