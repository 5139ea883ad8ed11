"""`gpuconst.full_many`: the arrays that a loop of `full` makes, in one piece of memory that any of them keeps alive."""

import gc
import itertools
import logging
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from many import element_of

import gpuconst
from gpuconst import creation
from gpuconst.dtypes import DTYPES

full_many = partial(gpuconst.full_many, device="cpu")


@pytest.fixture(autouse=True, scope="module", params=[creation.FEW, 0], ids=["in turn", "at once"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make few arrays in turn, as it is, and in one launch, as many are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(creation, "FEW", request.param)
        yield


@st.composite
def specs(draw: st.DrawFn) -> tuple[tuple[int, ...], Any, str]:
    shape = draw(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    itemsize = DTYPES[dtype].itemsize
    return shape, draw(st.sampled_from([True, 1, 1.0]) | st.binary(min_size=itemsize, max_size=itemsize)), dtype


# What is in it


@given(st.dictionaries(st.text(), specs(), max_size=30))
def test_the_same_bytes_as_numpy(asked: dict[str, tuple[tuple[int, ...], Any, str]]) -> None:
    made = full_many(asked)
    assert list(made) == list(asked)
    for name, (shape, value, dtype) in asked.items():
        array = made[name]
        assert (array.shape, array.dtype, array.device) == (shape, DTYPES[dtype].numpy, "cpu")
        assert array.to_numpy().tobytes() == element_of(value, dtype) * array.size
        assert array.data_ptr() % 256 == 0
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in made.values() if x.nbytes)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("shape", "value", "dtype", "expected"),
    [
        (3, 0.5, None, np.full(3, 0.5, np.float32)),
        ((), 7, None, np.full((), 7, np.int64)),
        ([2, np.int8(2)], True, None, np.full((2, 2), True)),
        ((2,), 1j, None, np.full(2, 1j, np.complex64)),
        (2, 1, torch.bfloat16, np.full(2, 1, DTYPES["bfloat16"].numpy)),
        (2, 1, np.dtype("u2"), np.full(2, 1, np.uint16)),
        (2, 1, jax.numpy.float16, np.full(2, 1, np.float16)),
        (0, 1, "int8", np.full(0, 1, np.int8)),
    ],
)
def test_what_full_takes(shape: Any, value: Any, dtype: Any, expected: np.ndarray) -> None:
    found = full_many({"name": (shape, value, dtype)})["name"].to_numpy()
    assert (found.shape, found.dtype, found.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())


@pytest.mark.parametrize("kind", [dict, OrderedDict, MappingProxyType])
def test_any_mapping_and_any_triple(kind: Any) -> None:
    made = full_many(kind({"b": (2, 1, None), "a": [3, 2, "int8"], 5: iter((1, 3.0, None))}))
    assert list(made) == ["b", "a", 5]
    assert [x.to_numpy().tolist() for x in made.values()] == [[1, 1], [2, 2, 2], [3.0]]


def test_nothing_asked_for() -> None:
    assert full_many({}) == {}


def test_a_hundred_thousand() -> None:
    count, dtypes = 100_000, ["float32", "bfloat16", "int64", "uint8"]
    made = full_many({f"{k}": ((k % 5, 3), k % 101, dtypes[k % 4]) for k in range(count)})
    assert list(made) == [f"{k}" for k in range(count)]
    arrays = [x.to_numpy() for x in made.values()]
    assert all(array.shape == (k % 5, 3) for k, array in enumerate(arrays))
    for k, dtype in enumerate(dtypes):
        expected = np.repeat(np.arange(k, count, 4) % 101, [3 * (n % 5) for n in range(k, count, 4)])
        found = np.concatenate([array.reshape(-1) for array in arrays[k::4]])
        assert found.dtype == DTYPES[dtype].numpy
        assert np.array_equal(found.astype(np.int64), expected)
    addresses = np.array([x.data_ptr() for x in made.values()])
    assert not (addresses % 256).any()
    assert (np.diff(addresses) >= np.array([x.nbytes for x in made.values()])[:-1]).all()


def test_large_and_small_ones() -> None:
    made = full_many({"small": (5, 1, "uint8"), "large": (40 << 20, 2, "uint8"), "odd": (100_003, 3, "uint8")})
    assert [(set(np.unique(x.to_numpy()).tolist()), x.nbytes) for x in made.values()] == [
        ({1}, 5),
        ({2}, 40 << 20),
        ({3}, 100_003),
    ]


# Who shares it


def test_frameworks_take_the_memory_as_it_is() -> None:
    made = full_many({"a": ((3, 5), 0.5, "bfloat16"), "b": (7, 2, "int32"), "c": ((), 1.5, "float32")})
    for array, expected in zip(made.values(), [0.5, 2, 1.5], strict=True):
        for taken in (array.to_torch(), array.to_jax()):
            assert tuple(taken.shape) == array.shape
            assert (taken == expected).all()
        assert array.to_torch().data_ptr() == array.data_ptr()
        assert array.to_jax().unsafe_buffer_pointer() == array.data_ptr()
        assert array.to_numpy().ctypes.data == array.data_ptr()


def test_writing_one_changes_no_other() -> None:
    made = full_many({name: (3, 1.0, None) for name in "abc"})
    made["a"].to_numpy()[...] = 5
    made["c"].to_torch().zero_()
    gpuconst.fill(made["b"], 2.0)
    assert [x.to_numpy().tolist() for x in made.values()] == [[5] * 3, [2] * 3, [0] * 3]
    assert not gpuconst.shares_memory(made["a"], made["b"])


def test_threads_hand_over_the_same_array_at_once() -> None:
    made = full_many({f"{k}": ((2, 3), float(k), None) for k in range(300)})
    start = threading.Barrier(4)

    def hand_over() -> list[tuple[int, float]]:
        start.wait()
        return [(x.data_ptr(), x.sum().item()) for x in (array.to_torch() for array in made.values())]

    with ThreadPoolExecutor(4) as pool:
        found = [task.result() for task in [pool.submit(hand_over) for _ in range(4)]]
    assert found == [[(x.data_ptr(), 6.0 * k) for k, x in enumerate(made.values())]] * 4


@pytest.mark.parametrize("nbytes", [1000, 3 << 20])
def test_the_last_view_keeps_the_memory(nbytes: int) -> None:
    """Imported into torch, and everything else dropped; new memory goes elsewhere."""
    made = full_many({f"{k}": (nbytes // 4, float(k), None) for k in range(10)})
    start, stop = made["0"].data_ptr(), made["9"].data_ptr() + made["9"].nbytes
    weight = made["4"].to_torch()[1:]
    one = weakref.ref(made["4"])
    del made
    gc.collect()
    assert one() is None
    others = [gpuconst.full(nbytes // 4, 7.0, device="cpu") for _ in range(40)]
    assert all(x.data_ptr() >= stop or x.data_ptr() + x.nbytes <= start for x in others)
    assert (weight == 4).all()
    weight += 1
    assert (weight == 5).all()


@pytest.mark.parametrize("consume", [lambda x: x, lambda x: x.to_numpy(), lambda x: x.to_torch(), np.from_dlpack])
def test_memory_is_given_back_with_the_last_view(consume: Any) -> None:
    made = full_many({"a": (40 << 20, 1, "uint8"), "b": (3, 2, "uint8")})  # too large to be kept for the next
    slab: Any = made["a"].to_numpy()
    while isinstance(slab.base, np.ndarray):
        slab = slab.base
    memory = weakref.ref(slab.base)
    view = consume(made["b"])
    del slab, made
    gc.collect()
    assert memory() is not None
    assert np.asarray(view).tolist() == [2, 2, 2]
    del view
    gc.collect()
    assert memory() is None


# What is refused

WRONG: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, r"has the spec 3, expected \(shape, fill_value, dtype\)"),
    (None, TypeError, "has the spec None"),
    ("abc", TypeError, "has the spec 'abc'"),
    (b"abc", TypeError, "has the spec b'abc'"),
    ({3: "shape", 1.0: "value", "float32": "dtype"}, TypeError, "has the spec {"),
    ({3, 1.0, "float32"}, TypeError, "has the spec {"),
    (np.zeros(3), TypeError, r"has the spec array\(\[0., 0., 0.\]\), expected"),
    ((3, 1.0), TypeError, r"has the spec \(3, 1.0\)"),
    ((3, 1.0, "float32", "cpu"), TypeError, "has the spec"),
    (("abc", 1.0, None), TypeError, "a shape is an int or a sequence of ints"),
    ((-1, 1.0, None), ValueError, "negative dimension"),
    ((2.5, 1.0, None), TypeError, "a shape is an int"),
    ((2**62, 1.0, None), OverflowError, r"more than 2\*\*63 - 1 bytes"),
    ((2**60 - 1, 0.0, "complex128"), OverflowError, r"more than 2\*\*63 - 1 bytes"),
    ((3, 1.0, "float31"), TypeError, "unknown dtype 'float31'"),
    ((3, 300, "int8"), OverflowError, "300 does not fit int8"),
    ((3, 0.5, "int8"), TypeError, "has a fraction"),
    ((3, "1", "int8"), TypeError, "fill_value is '1'"),
    ((3, b"abc", "int8"), ValueError, "fill_value has 3 bytes"),
    ((3, b"abc", None), TypeError, "give the dtype they are of"),
    ((3, 2**63, None), OverflowError, "does not fit int64"),
]


@pytest.mark.parametrize(("spec", "error", "message"), WRONG)
@pytest.mark.parametrize("last", [False, True])
def test_a_wrong_spec_is_told_with_its_name_before_anything_is_allocated(
    spec: Any, error: type[Exception], message: str, last: bool
) -> None:
    huge = {"huge": (2**57, 1, "uint8")}  # more memory than there is
    asked = {**huge, "layer.bias": spec} if last else {"layer.bias": spec, **huge}
    with pytest.raises(error, match=f"^'layer.bias':? .*{message}"):
        full_many(asked)


@pytest.mark.parametrize("count", [2, 4])  # 4 are 2**64 bytes, which 64 bits count as none
def test_together_more_bytes_than_can_be_counted(count: int) -> None:
    with pytest.raises(OverflowError, match=rf"the arrays take {count * 2**62} bytes together, more than 2\*\*63 - 1"):
        full_many({f"{k}": (2**62, 1, "uint8") for k in range(count)})


def test_more_memory_than_there_is() -> None:
    with pytest.raises(MemoryError, match="the host has no"):
        full_many({f"{k}": (2**58, 1, "uint8") for k in range(4)})


@pytest.mark.parametrize("asked", [[("a", (1, 1, None))], None, "abc", {("a", 1)}])
def test_what_is_no_mapping(asked: Any) -> None:
    with pytest.raises(TypeError, match=rf"specs is {type(asked).__name__}, expected a mapping of name to"):
        full_many(asked)


def test_device_and_stream() -> None:
    asked = {"a": (1, 1, None)}
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        gpuconst.full_many(asked, device="gpu")
    with pytest.raises(ValueError, match="stream=7 was given, but the memory is on the CPU"):
        full_many(asked, stream=7)
    with pytest.raises(TypeError, match="positional"):
        gpuconst.full_many(asked, "cpu")  # type: ignore[call-arg]


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "gpuconst"):
        full_many({"a": (3, 1.0, None), "b": (2, 1, "uint8"), "c": (0, 1, None)})
    (message,) = caplog.messages
    launches = 3 if creation.FEW else 1
    assert re.fullmatch(rf"filled 3 arrays, 14 bytes, in {launches} launches; took 0\.\d{{6}} s", message)
