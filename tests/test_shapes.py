"""Which shapes there are, and what is said of those that are none."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gpuconst


class Index:
    """What `__index__` is for: an int of somebody else's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def shape_of(shape: Any, dtype: str = "int8") -> tuple[int, ...]:
    """Return the shape that an array of gpuconst gets."""
    array = gpuconst.full(shape, 1, dtype=dtype, device="cpu")
    assert array.to_numpy().shape == array.shape
    assert all(type(length) is int for length in array.shape)
    return array.shape


@given(st.lists(st.integers(0, 5), max_size=6))
def test_every_spelling_of_a_shape_means_the_same(lengths: list[int]) -> None:
    expected = tuple(lengths)
    assert shape_of(expected) == expected
    assert shape_of(lengths) == expected
    assert shape_of(np.array(lengths, dtype=np.int64)) == expected
    assert shape_of([np.int8(length) for length in lengths]) == expected
    assert shape_of(tuple(map(Index, lengths))) == expected
    assert np.full(expected, 1, np.int8).shape == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), ()),
        ([], ()),
        (0, (0,)),
        (3, (3,)),
        (np.int64(3), (3,)),
        (np.array(3), (3,)),
        (Index(3), (3,)),
        (range(1, 4), (1, 2, 3)),
        ((2, 0, 3), (2, 0, 3)),
        ((0, 2**40), (0, 2**40)),
        ((1,) * 64, (1,) * 64),
        ([1] * 64, (1,) * 64),
    ],
)
def test_a_shape(shape: Any, expected: tuple[int, ...]) -> None:
    assert shape_of(shape) == expected


def test_the_shape_of_a_torch_tensor() -> None:
    torch = pytest.importorskip("torch")
    assert shape_of(torch.empty(2, 3).shape) == (2, 3)


@pytest.mark.needs("tensorflow")
def test_scalars_of_tensorflow_are_lengths_unless_they_are_bools() -> None:
    import tensorflow as tf

    assert shape_of(tf.constant(3)) == shape_of([tf.constant(3)]) == (3,)
    for shape in (tf.constant(True), [tf.constant(True)]):
        with pytest.raises(TypeError, match="not <tf.Tensor: shape=.., dtype=bool, numpy=True>"):
            gpuconst.full(shape, 1)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0, 5), (0, 2**40)])
@pytest.mark.parametrize("dtype", ["bool", "bfloat16", "complex128"])
def test_size_0(shape: tuple[int, ...], dtype: str) -> None:
    array = gpuconst.full(shape, 1, dtype=dtype, device="cpu")
    assert (array.size, array.nbytes, array.ndim) == (0, 0, len(shape))
    assert array.data_ptr() % 256 == 0
    assert array.to_numpy().shape == shape


def test_0_d() -> None:
    array = gpuconst.full((), 0.5, device="cpu")
    assert (array.shape, array.ndim, array.size, array.nbytes) == ((), 0, 1, 4)
    assert array.to_numpy()[()] == 0.5
    with pytest.raises(TypeError, match="0-d"):
        len(array)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (True, "not True"),
        (np.True_, "not np.True_"),
        (2.0, "not 2.0"),
        (None, "not None"),
        ("34", "not '34'"),
        (b"34", "not b'34'"),
        (bytearray(b"34"), "not bytearray(b'34')"),
        ({2: 3}, "not {2: 3}"),
        ({2, 3}, "not {2, 3}"),
        ((True,), "not True (in (True,))"),
        ((2, np.False_), "not np.False_"),
        (np.array([True]), "not np.True_"),
        (torch.tensor([True]), "not tensor(True)"),
        (torch.tensor(True), "not tensor(True)"),
        (torch.tensor([2.0, 3.0]), "not tensor(2.)"),
        ((2.0, 3), "not 2.0 (in (2.0, 3))"),
        ((2, None), "not None (in (2, None))"),
        (((2, 3),), "not (2, 3) (in ((2, 3),))"),
        (("2",), "not '2' (in ('2',))"),
        (np.array([2.0, 3.0]), "not np.float64(2.0)"),
    ],
    ids=str,
)
def test_what_is_no_shape(shape: Any, says: str) -> None:
    with pytest.raises(TypeError, match=re.escape(says)):
        gpuconst.full(shape, 1, device="cpu")


@pytest.mark.parametrize("shape", [-1, (-1,), (2, -3), [0, -1], Index(-1), (2**62, -1)], ids=str)
def test_a_negative_dimension(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"negative dimension \(-\d\)"):
        gpuconst.full(shape, 1, device="cpu")


@pytest.mark.parametrize("sequence", [tuple, list])
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        ((2**62, 4), "float32"),
        ((2**63,), "int8"),
        ((2**31, 2**31, 2), "uint8"),
        ((2**60,), "float64"),
        ((2**59,), "complex128"),
        ((10**30,), "bool"),
        # Nothing to hold, but strides that no 64-bit integer can.
        ((0, 2**62, 4), "float32"),
    ],
    ids=str,
)
def test_more_than_memory_can_ever_be(lengths: tuple[int, ...], dtype: str, sequence: type) -> None:
    with pytest.raises(OverflowError, match=r"more than 2\*\*63 - 1 bytes"):
        gpuconst.full(sequence(lengths), 1, dtype=dtype, device="cpu")


@pytest.mark.parametrize(("length", "dtype"), [(2**63, "int8"), (2**60, "float64"), (2**59, "complex128")])
def test_one_length_that_is_more_than_memory_can_ever_be(length: int, dtype: str) -> None:
    with pytest.raises(OverflowError, match=r"more than 2\*\*63 - 1 bytes"):
        gpuconst.full(length, 1, dtype=dtype, device="cpu")


def test_a_shape_that_holds_nothing_has_the_same_limit() -> None:
    with pytest.raises(
        OverflowError, match=r"holds nothing, but its other dimensions would have more than 2\*\*63 - 1"
    ):
        gpuconst.full((0, 2**63), 1, device="cpu")


@pytest.mark.parametrize("shape", [2**63 - 1, [2**63 - 1], (2**31, 2**31), (2**48,)], ids=str)
def test_more_than_this_machine_has(shape: Any) -> None:
    nbytes = shape if isinstance(shape, int) else math.prod(shape)
    with pytest.raises(gpuconst.OutOfMemoryError, match=f"the host has no {nbytes:,} bytes left"):
        gpuconst.full(shape, 1, dtype="int8", device="cpu")


def test_more_than_64_dimensions() -> None:
    with pytest.raises(ValueError, match="at most 64 dimensions, not 65"):
        gpuconst.full((1,) * 65, 1, device="cpu")


def test_a_shape_is_checked_before_the_device_is_looked_at() -> None:
    with pytest.raises(ValueError, match="negative"):
        gpuconst.full(-1, 1, device="nowhere")
