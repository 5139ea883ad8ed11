"""`gpuconst.fill_many` writes what filling one array after the other writes, or nothing at all."""

import array
import ctypes
import gc
import itertools
import logging
import mmap
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from many import Entry, FreshBuffer, cases, filled, noise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import gpuconst
from gpuconst import filling
from gpuconst.batch import gather
from gpuconst.dtypes import DTYPES
from gpuconst.kernels import host, host_fill

# What is written


#: Few arrays are filled in turn where that can be; many, which to these tests are any, in launches.
both_ways = pytest.mark.parametrize("few", [filling.FEW, 0], ids=["in turn", "at once"])


def fill_many(few: int, *arguments: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "FEW", few)
        gpuconst.fill_many(*arguments)


@both_ways
@given(cases())
@example((1024, [Entry("torch", "float32", (4,), (4,), start, b"abcd") for start in (64, 99, 130, 200, 64)]))
def test_the_same_bytes_as_one_fill_after_the_other(few: int, case: tuple[int, list[Entry]]) -> None:
    size, entries = case
    memory = noise(size)
    fill_many(few, [entry.over(memory) for entry in entries], [entry.value for entry in entries])
    np.testing.assert_array_equal(memory, filled(size, entries))


@both_ways
@given(cases(), st.sampled_from([True, 1, 1.0, np.array(1)]))
def test_one_value_for_all(few: int, case: tuple[int, list[Entry]], value: Any) -> None:
    size, entries = case[0], [entry._replace(value=value) for entry in case[1]]
    memory = noise(size)
    fill_many(few, [entry.over(memory) for entry in entries], value)
    np.testing.assert_array_equal(memory, filled(size, entries))


@given(cases())
def test_a_few_ordinary_arrays_are_filled_in_turn(case: tuple[int, list[Entry]]) -> None:
    size, entries = case[0], [entry for entry in case[1] if _ordinary(entry.over(noise(case[0])))]
    memory = noise(size)
    arrays = [entry.over(memory) for entry in entries]
    assert filling._filled_in_turn(arrays, [entry.value for entry in entries]) == bool(arrays)
    np.testing.assert_array_equal(memory, filled(size, entries))
    assert all(x._version for x in arrays if isinstance(x, torch.Tensor))


def _ordinary(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return x.is_contiguous() and x.numel() > 0
    return isinstance(x, np.ndarray)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if hasattr(torch, name)])
@pytest.mark.parametrize("offset", [0, 1])
def test_many_of_every_length(dtype: str, offset: int) -> None:
    """Those of one length are filled together."""
    itemsize = DTYPES[dtype].itemsize
    lengths = [n for n in [*range(1, 20), 255, 256, 257, host.LONGEST_SCATTERED // itemsize] for _ in range(6)]
    starts = [0, *itertools.accumulate(n * itemsize + 32 + offset for n in lengths)]
    entries = [
        Entry("torch", dtype, (n,), (itemsize,), 64 + start, bytes([k % 256] * (itemsize - 1) + [k // 256 + 1]))
        for k, (n, start) in enumerate(zip(lengths, starts, strict=False))
    ]
    memory = noise(starts[-1] + 128)
    gpuconst.fill_many([entry.over(memory) for entry in entries], [entry.value for entry in entries])
    assert np.array_equal(memory, filled(len(memory), entries))


def test_large_and_small_ones_at_once() -> None:
    sizes = [1, host.LONGEST_SCATTERED + 1, host_fill.BY_WORDS, host_fill.BY_ADDRESS + 3, host_fill.PIECE + 17]
    arrays = [np.zeros(size + 2, np.uint8) for size in sizes]
    gpuconst.fill_many([x[1:-1] for x in arrays], [k + 1 for k in range(len(sizes))])
    for k, x in enumerate(arrays):
        assert (x[1:-1] == k + 1).all()
        assert (x[0], x[-1]) == (0, 0)


def test_a_hundred_thousand_at_once() -> None:
    count, dtypes = 100_000, [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
    memory = np.zeros((count, 32), np.uint8)
    gpuconst.fill_many(
        [row[8:16].view(dtypes[k % 4]) for k, row in enumerate(torch.from_numpy(memory).unbind())],
        [k % 101 for k in range(count)],
    )
    expected = np.zeros_like(memory)
    for k, dtype in enumerate(dtypes):
        numbers = (torch.arange(k, count, 4) % 101)[:, None].expand(-1, 8 // dtype.itemsize)
        expected[k::4, 8:16] = numbers.to(dtype).contiguous().view(torch.uint8)
    assert np.array_equal(memory, expected)


def buffers() -> dict[str, tuple[Any, Callable[[Any], bytes]]]:
    """Return 24 bytes of every kind that there is on the CPU, and what reads them."""

    def numpy_bytes(x: Any) -> bytes:
        return np.asarray(x).tobytes()

    return {
        "torch": (torch.zeros(6), lambda x: x.numpy().tobytes()),
        "parameter": (torch.nn.Parameter(torch.zeros(6), requires_grad=False), lambda x: x.numpy().tobytes()),
        "subclass": (torch.zeros(6).as_subclass(type("Sub", (torch.Tensor,), {})), lambda x: x.numpy().tobytes()),
        "strided tensor": (torch.zeros(2, 3).T, lambda x: x.numpy().tobytes()),
        "strided": (np.zeros((6, 2), np.float32)[:, 0], numpy_bytes),
        "numpy": (np.zeros(6, np.float32), numpy_bytes),
        "bits": (np.zeros(24, np.uint8), numpy_bytes),
        "masked": (np.ma.zeros(6, np.float32), numpy_bytes),
        "array": (gpuconst.zeros(6, device="cpu"), numpy_bytes),
        "bytearray": (bytearray(24), bytes),
        "memoryview": (memoryview(bytearray(24)), bytes),
        "standard library": (array.array("f", [0] * 6), lambda x: x.tobytes()),
        "ctypes": ((ctypes.c_float * 6)(), bytes),
        "mmap": (mmap.mmap(-1, 24), lambda x: x[:]),
    }


def test_every_kind_of_array_at_once() -> None:
    made = buffers()
    itemsizes = [1 if name in {"bits", "bytearray", "memoryview", "mmap"} else 4 for name in made]
    values = [bytes(range(k, k + itemsize)) for k, itemsize in enumerate(itemsizes, start=1)]
    gpuconst.fill_many((x for x, _ in made.values()), iter(values))
    for (name, (x, read)), value in zip(made.items(), values, strict=True):
        assert read(x) == value * (24 // len(value)), name


def test_bytes_for_all() -> None:
    arrays = [torch.zeros(3), np.zeros(2, np.int32), gpuconst.zeros(2, device="cpu")]
    gpuconst.fill_many(arrays, b"\x01\x00\xa0\x7f")
    for x in arrays:
        assert (np.asarray(x).view(np.uint32) == 0x7FA00001).all()


@pytest.mark.parametrize("values", [[1, 2], (1, 2), np.array([1, 2]), iter([1, 2]), range(1, 3)])
def test_values_from_any_iterable(values: Any) -> None:
    arrays = [torch.zeros(2), np.zeros(3)]
    gpuconst.fill_many(iter(arrays), values)
    assert [np.asarray(x).tolist() for x in arrays] == [[1, 1], [2, 2, 2]]


@pytest.mark.parametrize("xs", [[], (), {}.values(), [torch.zeros(0), np.zeros((3, 0))]])
def test_nothing_to_fill(xs: Any) -> None:
    gpuconst.fill_many(xs, 1)
    gpuconst.fill_many(xs, [1] * len(xs))
    gpuconst.fill_many(xs, 1, stream=7)


def test_a_value_must_fit_empty_arrays_too() -> None:
    with pytest.raises(OverflowError, match=r"xs\[0\]"):
        gpuconst.fill_many([np.zeros(0, np.uint8)], 256)


# Arrays that intersect


def test_the_later_wins() -> None:
    x = torch.zeros(6)
    gpuconst.fill_many([x, x[2:], x, x[4:], x[1:2]], [1, 2, 3, 4, 5])
    assert x.tolist() == [3, 5, 3, 3, 4, 4]


def test_the_same_tensor_twice() -> None:
    x = torch.zeros(3)
    gpuconst.fill_many([x, x], [1, 2])
    assert x.tolist() == [2, 2, 2]


def test_interleaved_strided_arrays() -> None:
    x = np.zeros((4, 6))
    gpuconst.fill_many([x[:, k::3] for k in range(3)], [1, 2, 3])
    assert x.tolist() == [[1, 2, 3] * 2] * 4


def test_a_pitched_run_reaches_to_the_end_of_its_last_stretch() -> None:
    x = np.zeros((4, 1000), np.float32)
    halves = [x[:, :500], x[:, 500:], x[3, 100:200]]
    assert [batch.runs["count"].tolist() for batch in gather(halves, 0, None)] == [[4], [4], [1]]
    gpuconst.fill_many(halves, [1, 2, 3])
    assert x.tolist() == [[1] * 500 + [2] * 500] * 3 + [[1] * 100 + [3] * 100 + [1] * 300 + [2] * 500]


def test_neighbours_do_not_intersect() -> None:
    x = torch.zeros(12)
    batches = gather([x[4:8], x[:4], x[8:], x[2:6]], 0, None)
    assert [len(batch.runs) for batch in batches] == [3, 1]


def test_a_pitched_run_does_not_intersect_what_follows_its_last_stretch() -> None:
    x = np.zeros((4, 1000), np.float32)
    (batch,) = gather([x[:, :500], x[3, 500:]], 0, None)
    assert sorted(batch.runs["count"].tolist()) == [1, 4]


def depths(entries: list[Entry]) -> list[int]:
    """Return for each entry how many others, each of which intersects the next, must be filled before it."""
    spans: list[tuple[int, int, int]] = []
    for entry in entries:
        steps = [(n - 1) * s for n, s in zip(entry.shape, entry.strides, strict=True)]
        low = entry.start + sum(step for step in steps if step < 0)
        high = entry.start + sum(step for step in steps if step > 0) + DTYPES[entry.dtype].itemsize
        if 0 not in entry.shape:
            spans.append((low, high, max([d + 1 for a, b, d in spans if a < high and low < b], default=0)))
    return [depth for _, _, depth in spans]


@given(cases())
def test_the_fewest_batches(case: tuple[int, list[Entry]]) -> None:
    size, entries = case
    memory = noise(size)
    batches = gather([entry.over(memory) for entry in entries], b"", [entry.value for entry in entries])
    found = [len(batch.runs) + len(batch.strided) for batch in batches]
    expected = depths(entries)
    assert found == [expected.count(depth) for depth in range(max(expected, default=-1) + 1)]


def test_halves_of_many_matrices_take_two_batches() -> None:
    matrices = [torch.empty(4, 8) for _ in range(500)]
    halves = [half for x in matrices for half in (x[:, :4], x[:, 4:])]
    assert [len(batch.strided) for batch in gather(halves, 0, None)] == [500, 500]


# All or nothing


def requires_grad() -> torch.Tensor:
    return torch.zeros(3, requires_grad=True)


def made_in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


def read_only() -> np.ndarray:
    x = np.zeros(3)
    x.setflags(write=False)
    return x


def without_storage() -> torch.Tensor:
    x = torch.zeros(3)
    x.untyped_storage().resize_(0)
    return x


def cut_short() -> torch.Tensor:
    x = torch.zeros(30)
    x.untyped_storage().resize_(4)
    return x


def beyond_its_storage() -> torch.Tensor:
    x = torch.zeros(30)
    view = x[20:]
    x.untyped_storage().resize_(100)
    return view


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)]).transpose(1, 2)


BAD: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "value too large": (lambda: torch.zeros(3, dtype=torch.int8), 300, OverflowError, "300 does not fit int8"),
    "value too large for NumPy": (lambda: np.zeros(3, np.int8), 300, OverflowError, "300 does not fit int8"),
    "fraction": (lambda: torch.zeros(3, dtype=torch.int8), 0.5, TypeError, "has a fraction"),
    "no number": (lambda: torch.zeros(3), "1", TypeError, "fill_value is '1'"),
    "tensor as value": (lambda: torch.zeros(3), torch.ones(()), TypeError, "fill_value is tensor"),
    "too few bytes": (lambda: torch.zeros(3), b"abc", ValueError, "fill_value has 3 bytes"),
    "read-only": (read_only, 1, ValueError, "read-only"),
    "bytes": (lambda: b"abc", 1, ValueError, "read-only"),
    "jax": (lambda: jnp.zeros(3), 1, ValueError, "JAX arrays are immutable"),
    "leaf": (requires_grad, 1, RuntimeError, "requires grad and autograd is recording"),
    "result": (lambda: requires_grad() * 1, 1, RuntimeError, "requires grad and autograd is recording"),
    "inference": (made_in_inference_mode, 1, RuntimeError, "inference mode"),
    "conjugate": (lambda: torch.zeros(3, dtype=torch.complex64).conj(), 1, ValueError, "conjugate view"),
    "negative": (lambda: torch.zeros(3, dtype=torch.complex64).conj().imag, 1, ValueError, "lazy negative"),
    "contiguous negative": (lambda: torch.zeros(1, dtype=torch.complex64).conj().imag, 1, ValueError, "lazy negative"),
    "sparse": (lambda: torch.eye(3).to_sparse(), 1, TypeError, "layout is torch.sparse_coo"),
    "nested": (nested, 1, TypeError, "the tensor is nested"),
    "bits": (lambda: torch.empty(3, dtype=torch.bits8), 1, TypeError, "unknown dtype torch.bits8"),
    "without storage": (without_storage, 1, ValueError, "storage was resized to 0 bytes"),
    "cut short": (cut_short, 1, ValueError, "storage was resized to 4 bytes, it needs 120"),
    "beyond its storage": (beyond_its_storage, 1, ValueError, "storage was resized to 100 bytes, it needs 120"),
    "byte order": (lambda: np.zeros(3, ">f4"), 1, TypeError, "byte order"),
    "no bytes": (lambda: np.empty(3, "V0"), 1, TypeError, "unknown dtype"),
    "NumPy scalar": (lambda: np.float32(1), 1, TypeError, "is a NumPy scalar"),
    "None": (lambda: None, 1, TypeError, "NoneType is no array"),
}


@pytest.mark.parametrize("prepare", [gpuconst.fill_many, gpuconst.plan_fill])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("kind", BAD)
def test_nothing_is_written_if_one_cannot_be(kind: str, where: str, prepare: Callable[..., Any]) -> None:
    make, value, error, message = BAD[kind]
    tensors = [torch.zeros(3), torch.zeros(3, 3).T[1:], torch.zeros(3)]
    good: list[Any] = [*tensors, np.zeros(3), gpuconst.zeros(3, device="cpu")]
    index = {"first": 0, "middle": 2, "last": len(good)}[where]
    with pytest.raises(error, match=rf"^xs\[{index}\]: .*{message}"):
        prepare([*good[:index], make(), *good[index:]], [*[1] * index, value, *[1] * (len(good) - index)])
    assert not any(np.asarray(x).any() for x in good)
    assert [x._version for x in tensors] == [0, 0, 0]


@pytest.mark.parametrize("kind", [kind for kind, (make, *_) in BAD.items() if isinstance(make(), torch.Tensor)])
def test_nothing_is_written_if_one_of_a_few_tensors_cannot_be(kind: str) -> None:
    make, value, error, message = BAD[kind]
    good = [torch.zeros(3) for _ in range(4)]
    with pytest.raises(error, match=rf"^xs\[4\]: .*{message}"):
        gpuconst.fill_many([*good, make()], [1, 1, 1, 1, value])
    assert not any(x.any() for x in good)
    assert [x._version for x in good] == [0, 0, 0, 0]


class CodedError(ValueError):
    def __init__(self, code: int) -> None:
        super().__init__({7: "the exporter is closed"}[code])


class Closed:
    def __dlpack__(self, **arguments: Any) -> Any:
        raise CodedError(7)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_an_error_that_takes_no_message_gets_a_note() -> None:
    with pytest.raises(CodedError, match="the exporter is closed") as caught:
        gpuconst.fill_many([np.zeros(3), Closed()], 1)
    assert caught.value.__notes__ == ["xs[1]"]


def test_one_value_that_does_not_fit_all() -> None:
    arrays = [torch.zeros(3), torch.zeros(3, dtype=torch.int8), torch.zeros(3, dtype=torch.uint8)]
    with pytest.raises(OverflowError, match=r"^xs\[2\]: -1 does not fit uint8"):
        gpuconst.fill_many(arrays, -1)
    assert not any(x.any() for x in arrays)


@pytest.mark.parametrize("values", [[1], [1, 2, 3], [], iter([1]), np.zeros(3), itertools.count()])
def test_lengths_that_differ(values: Any) -> None:
    arrays = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(
        ValueError, match=r"there are 2 arrays and (0|1|more than 2) values; expected one value, or one for each"
    ):
        gpuconst.fill_many(arrays, values)
    assert not any(x.any() for x in arrays)


@pytest.mark.parametrize("value", [bytearray([1, 2]), "12"])
def test_what_is_one_value_by_mistake_is_no_list_of_them(value: Any) -> None:
    arrays = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(TypeError, match=rf"^xs\[0\]: fill_value is {re.escape(repr(value))} of type"):
        gpuconst.fill_many(arrays, value)
    assert not any(x.any() for x in arrays)


@pytest.mark.parametrize("values", [{1, 2}, {1: 2, 3: 4}, {}, frozenset({5})], ids=repr)
def test_values_that_have_no_order(values: Any) -> None:
    arrays = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(
        TypeError, match=rf"fill_values is {type(values).__name__}, expected one value, or one for each array in a list"
    ):
        gpuconst.fill_many(arrays, values)
    assert not any(x.any() for x in arrays)


def test_arrays_that_have_no_order() -> None:
    arrays = {torch.zeros(3), torch.zeros(3)}
    with pytest.raises(TypeError, match="xs is set, which has no order for a value each; pass a list"):
        gpuconst.fill_many(arrays, [1.0, 2.0])
    assert not any(x.any() for x in arrays)
    gpuconst.fill_many(arrays, 1.0)
    assert all((x == 1).all() for x in arrays)


def test_arrays_in_an_array_of_objects() -> None:
    xs = np.empty(2, object)
    xs[:] = [np.zeros(3), np.zeros(4)]
    with pytest.raises(TypeError, match=r"expected several arrays; pass its tolist\(\)"):
        gpuconst.fill_many(xs, 1.0)
    gpuconst.fill_many(xs.tolist(), 1.0)
    assert all((x == 1).all() for x in xs)


@pytest.mark.parametrize("values", [torch.ones(2), jnp.ones(2), gpuconst.ones(2, device="cpu")])
def test_values_in_the_array_of_a_framework(values: Any) -> None:
    arrays = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(TypeError, match=rf"fill_values is {type(values).__name__}.*in a list or a NumPy array"):
        gpuconst.fill_many(arrays, values)
    assert not any(x.any() for x in arrays)
    gpuconst.fill_many(arrays, np.asarray(values))
    assert all((x == 1).all() for x in arrays)


@pytest.mark.parametrize("prepare", [gpuconst.fill_many, gpuconst.plan_fill])
@pytest.mark.parametrize("module", [torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(2, 3))])
def test_a_module_or_a_dict_instead_of_arrays(module: torch.nn.Module, prepare: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"xs is {type(module).__name__}, .*; pass its parameters\(\) or buffers\(\)"):
        prepare(module, 1)
    with pytest.raises(TypeError, match=r"xs is OrderedDict, .*; pass its values\(\)"):
        prepare(module.state_dict(), 1)
    prepare(module.state_dict().values(), 1)


@pytest.mark.parametrize("prepare", [gpuconst.fill_many, gpuconst.plan_fill])
def test_a_generator_used_twice(prepare: Callable[..., Any]) -> None:
    module = torch.nn.Linear(2, 2)
    parameters = module.parameters()
    with torch.no_grad():
        prepare(parameters, 1)
        with pytest.raises(ValueError, match="the iterator xs gave no arrays"):
            prepare(parameters, 2)
        values = iter([3, 4])
        prepare(module.parameters(), values)
        with pytest.raises(ValueError, match="2 arrays and 0 values"):
            prepare(module.parameters(), values)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3),
        np.zeros(3),
        np.zeros(()),
        gpuconst.zeros(3, device="cpu"),
        jnp.zeros(3),
        bytearray(3),
        memoryview(bytearray(3)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_one_array_instead_of_several(x: Any) -> None:
    with pytest.raises(TypeError, match=rf"xs is {type(x).__name__}, expected several arrays; .*gpuconst\.fill"):
        gpuconst.fill_many(x, 1)


def test_a_dataset_whose_rows_are_copies() -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File("rows", "w", driver="core", backing_store=False) as file:
        rows = file.create_dataset("rows", data=np.zeros((2, 3)))
        with pytest.raises(TypeError, match="xs is Dataset, expected several arrays; its parts may be copies"):
            gpuconst.fill_many(rows, 1)


@pytest.mark.parametrize("x", [None, 5, torch.optim.SGD([torch.zeros(3)])], ids=lambda x: type(x).__name__)
def test_no_arrays_at_all(x: Any) -> None:
    with pytest.raises(TypeError, match=rf"xs is {type(x).__name__}, expected several arrays; pass a list of them$"):
        gpuconst.fill_many(x, 1)


@pytest.mark.parametrize(
    "prepare", [gpuconst.fill_many, lambda *args, stream: gpuconst.plan_fill(*args).fill(stream=stream)]
)
def test_a_stream_for_the_cpu(prepare: Callable[..., Any]) -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="stream=7 was given, but all arrays are on the CPU"):
        prepare([x, np.zeros(3)], 1, stream=7)
    assert not x.any()
    assert x._version == 0


# What torch asks


def test_backward_raises_after_saved_values_were_filled() -> None:
    saved = [torch.ones(3, requires_grad=True) * 1 for _ in range(3)]
    results = [(x * x).sum() for x in saved]
    with torch.no_grad():
        gpuconst.fill_many([saved[0], np.zeros(3), saved[1][1:]], 5)
    for result in results[:2]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()  # type: ignore[no-untyped-call]
    results[2].backward()  # type: ignore[no-untyped-call]


def test_parameters_are_filled_outside_of_autograd() -> None:
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        gpuconst.fill_many(module.parameters(), [0.5, 0.25])
    assert (module.weight == 0.5).all()
    assert (module.bias == 0.25).all()
    assert (module(torch.ones(1, 3)) == 1.75).all()


def test_inference_tensors_in_inference_mode() -> None:
    with torch.inference_mode():
        arrays: list[Any] = [torch.zeros(3), np.zeros(3)]
        gpuconst.fill_many(arrays, 5)
        assert [x.tolist() for x in arrays] == [[5, 5, 5], [5, 5, 5]]


def test_what_has_no_memory_is_left_alone() -> None:
    with FakeTensorMode():
        fake = torch.zeros(3)
    real = torch.zeros(3)
    gpuconst.fill_many([fake, real, torch.zeros(3, device="meta"), np.zeros(0)], 5)
    assert real.tolist() == [5, 5, 5]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_in_forward_mode_what_has_no_tangent_is_filled() -> None:
    with forward_ad.dual_level():
        x = torch.zeros(3)
        dual = forward_ad.make_dual(torch.zeros(3), torch.ones(3))  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match=r"^xs\[1\]: .*tangent"):
            gpuconst.fill_many([x, dual], 5)
        assert not x.any()
        gpuconst.fill_many([x], 5)
    assert x.tolist() == [5, 5, 5]


def test_of_dtensors_the_local_part_is_filled(run_python: Callable[..., str]) -> None:
    printed = run_python(
        """
        import torch, torch.distributed as dist
        from torch.distributed.tensor import Shard, distribute_tensor
        import gpuconst

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        plain = torch.ones(3)
        try:
            gpuconst.fill_many([plain, x, parameter], 5)
        except RuntimeError as error:
            print(str(error)[:6], plain.tolist(), x._version)
        with torch.no_grad():
            plan = gpuconst.plan_fill([plain, x, parameter], [2, 3, 4])
            gpuconst.fill_many([x, plain, parameter], 5)
            print(plain.unique().tolist(), x.to_local().unique().tolist(), parameter.to_local().unique().tolist())
            plan.fill()
            print(plain.unique().tolist(), x.to_local().unique().tolist(), parameter.to_local().unique().tolist())
        print(plan.stale(), x._version)
        x._local_tensor = x._local_tensor.clone()
        print(plan.stale())
        dist.destroy_process_group()
        """
    )
    assert printed.splitlines() == [
        "xs[2]: [1.0, 1.0, 1.0] 0",
        "[5.0] [5.0] [5.0]",
        "[2.0] [3.0] [4.0]",
        "[] 2",
        "[1]",
    ]


def test_numpy_arrays_need_no_torch(run_python: Callable[..., str]) -> None:
    printed = run_python(
        """
        import sys
        sys.modules["torch"] = None  # as if it were not installed
        import numpy as np, gpuconst

        arrays = [np.zeros(3), bytearray(2), gpuconst.zeros(2, device="cpu")]
        gpuconst.fill_many(arrays, [1, 2, 3])
        plan = gpuconst.plan_fill(arrays, 4)
        plan.fill()
        print(arrays[0].tolist(), list(arrays[1]), arrays[2].to_numpy().tolist(), plan.stale())
        """
    )
    assert printed == "[4.0, 4.0, 4.0] [4, 4] [4.0, 4.0] []"


# What is kept alive


def test_memory_is_held_until_it_is_filled_and_no_longer() -> None:
    x = FreshBuffer()
    batches = gather([np.zeros(3), x], 1, None)
    gc.collect()
    assert x.made[-1]() is not None
    del batches
    gc.collect()
    assert x.made[-1]() is None


def test_no_reference_is_kept() -> None:
    arrays: list[Any] = [x for x, _ in buffers().values()]
    gpuconst.fill_many(arrays, 0)
    gc.collect()
    before = [sys.getrefcount(x) for x in arrays]
    for _ in range(20):
        gpuconst.fill_many(arrays, 0)
    gc.collect()
    assert [sys.getrefcount(x) for x in arrays] == before


# What is logged


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.zeros(6)
    with caplog.at_level(logging.DEBUG, "gpuconst"):
        gpuconst.fill_many([x, x[:2], np.zeros((4, 2))[:, 0]], 1)
        gpuconst.fill_many([x, x[:2], bytearray(32), np.zeros((4, 200))[:, :100]], 1)
    in_turn, at_once = caplog.messages
    assert re.fullmatch(r"filled 3 arrays, 64 bytes, in 3 launches; took 0\.\d{6} s", in_turn)
    assert re.fullmatch(r"filled 4 arrays, 3264 bytes, in 2 launches; took 0\.\d{6} s", at_once)
