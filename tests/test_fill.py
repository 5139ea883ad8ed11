"""`gpuconst.fill` writes what NumPy's own assignment writes, into whatever memory, and not a byte beside it."""

import array
import ctypes
import gc
import mmap
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lying_capsules import DLPackOnly
from many import FreshBuffer, noise

import gpuconst
from gpuconst.dtypes import DTYPES
from gpuconst.kernels import host_fill
from gpuconst.views import view_of

GUARD = 64
TORCH_DTYPES = [name for name in DTYPES if hasattr(torch, name)]


def value_of(dtype: str) -> Any:
    """Return a value that the dtype holds exactly, with as many different bytes as it goes."""
    kind = DTYPES[dtype].numpy.kind
    if kind in "iu":
        return int.from_bytes(bytes(range(0x21, 0x21 + DTYPES[dtype].itemsize)), "little")
    return {"b": True, "c": 1.5 - 2.25j, "f": 1.1}.get(kind, 2.0)


def element_of(dtype: str) -> np.ndarray:
    return np.asarray(value_of(dtype)).astype(DTYPES[dtype].numpy)


def guarded(shape: Any, dtype: str, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return memory, and an array in it that begins `offset` bytes beside an aligned address."""
    row = DTYPES[dtype]
    memory = noise(int(np.prod(shape)) * row.itemsize + offset + 2 * GUARD)
    return memory, np.ndarray(shape, row.numpy, memory.data, GUARD + offset)


# Layouts of a NumPy array, as functions of a C-ordered one of shape (6, 8).
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda a: a,
    "sliced": lambda a: a[1:5, ::3],
    "transposed": lambda a: a.T,
    "inner part": lambda a: a[1:5, 2:7],
    "0-d": lambda a: a[3, 3:4].reshape(()),
    "empty": lambda a: a[3:3],
    "size-1 dimensions": lambda a: a[:, None, :4, None],
}
FLIPPED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flipped": lambda a: a[::-1, ::-2],
    "flipped in one dimension": lambda a: a[::-1],
    "flipped and transposed": lambda a: a[::2, ::-1].T,
}


class LegacyDLPackOnly(DLPackOnly):
    """An exporter of before DLPack 1.0, which knows no `max_version`."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


class CopiesUnlessToldNotTo(DLPackOnly):
    def __dlpack__(self, **arguments: Any) -> Any:
        array = self.array if arguments.get("copy") is False else self.array.copy()
        return array.__dlpack__(**arguments)


class ArrayInterfaceOnly:
    def __init__(self, array: np.ndarray) -> None:
        self.__array_interface__ = array.__array_interface__
        self.array = array


class ArrayStructOnly:
    def __init__(self, array: np.ndarray) -> None:
        self.__array_struct__ = array.__array_struct__
        self.array = array


# Objects of other libraries and protocols over the memory of a NumPy array.
OBJECTS: dict[str, Callable[[np.ndarray], Any]] = {
    "NumPy array": lambda a: a,
    "NumPy subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
    "memoryview": lambda a: a.data,
    "torch tensor": torch.from_numpy,
    "torch subclass": lambda a: torch.from_numpy(a).as_subclass(type("Sub", (torch.Tensor,), {})),
    "tvm_ffi tensor": lambda x: pytest.importorskip("tvm_ffi").from_dlpack(x),
    "DLPack of NumPy": DLPackOnly,
    "DLPack of torch": lambda a: DLPackOnly(torch.from_numpy(a)),
    "legacy DLPack of NumPy": LegacyDLPackOnly,
    "legacy DLPack of torch": lambda a: LegacyDLPackOnly(torch.from_numpy(a)),
    "__array_interface__": ArrayInterfaceOnly,
    "__array_struct__": ArrayStructOnly,
}
TAKE_FLIPPED = ["NumPy array", "NumPy subclass", "memoryview", "DLPack of NumPy", "__array_interface__"]
CASES = [
    *((layout, name) for layout in LAYOUTS for name in OBJECTS),
    *((layout, name) for layout in FLIPPED for name in TAKE_FLIPPED),
]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_fill_writes_what_numpy_writes(layout: str, name: str) -> None:
    memory, whole = guarded((6, 8), "float32")
    target = {**LAYOUTS, **FLIPPED}[layout](whole)
    assert np.shares_memory(target, memory) == (target.size > 0)
    x = OBJECTS[name](target)
    assert gpuconst.fill(x, 0.1) is x
    found = memory.copy()
    memory[:] = noise(memory.size)
    target[...] = 0.1
    np.testing.assert_array_equal(found, memory)


@pytest.mark.parametrize("name", OBJECTS)
def test_fill_keeps_no_reference(name: str) -> None:
    _, target = guarded((6, 8), "float32")
    x = OBJECTS[name](target)
    gpuconst.fill(x, 1.0)
    gc.collect()
    before = sys.getrefcount(target), sys.getrefcount(x)
    for _ in range(50):
        gpuconst.fill(x, 2.0)
    gc.collect()
    assert (sys.getrefcount(target), sys.getrefcount(x)) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_every_dtype_of_numpy(dtype: str, offset: int) -> None:
    memory, target = guarded((3, 5), dtype, offset)
    gpuconst.fill(target, value_of(dtype))
    found = memory.copy()
    memory[:] = noise(memory.size)
    target[...] = element_of(dtype)
    np.testing.assert_array_equal(found, memory)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_of_torch(dtype: str) -> None:
    itemsize = DTYPES[dtype].itemsize
    raw = torch.from_numpy(noise((2 * 8 + 15) * itemsize))
    target = raw.view(getattr(torch, dtype))[8:-8].view(3, 5)
    gpuconst.fill(target, value_of(dtype))
    expected = noise((2 * 8 + 15) * itemsize)
    expected[8 * itemsize : -8 * itemsize] = np.tile(np.frombuffer(element_of(dtype).tobytes(), np.uint8), 15)
    np.testing.assert_array_equal(raw.numpy(), expected)


@pytest.mark.parametrize("dtype", [name for name, row in DTYPES.items() if row.numpy.kind != "c"])
def test_every_dtype_of_dlpack(dtype: str) -> None:
    x = gpuconst.ones((3, 5), dtype=dtype, device="cpu")
    tensor = pytest.importorskip("tvm_ffi").from_dlpack(x)
    gpuconst.fill(tensor, value_of(dtype))
    assert x.to_numpy().tobytes() == element_of(dtype).tobytes() * 15


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_of_ours(dtype: str) -> None:
    x = gpuconst.full((3, 5), 1, dtype=dtype, device="cpu")
    view = x.to_numpy()
    assert gpuconst.fill(x, value_of(dtype)) is x
    assert view.tobytes() == element_of(dtype).tobytes() * 15


@st.composite
def views(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, str]:
    """Any memory, and any array in it: strides of any sign and size, also such that elements overlap."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    itemsize = DTYPES[dtype].itemsize
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    unit = draw(st.sampled_from([1, itemsize]))
    strides = [unit * draw(st.integers(-20, 20)) for _ in shape]
    steps = [(max(n, 1) - 1) * s for n, s in zip(shape, strides, strict=True)]
    start = GUARD + draw(st.integers(0, 15)) - sum(step for step in steps if step < 0)
    memory = noise(start + sum(step for step in steps if step > 0) + itemsize + GUARD)
    return memory, np.ndarray(shape, DTYPES[dtype].numpy, memory.data, start, strides), dtype


@given(views())
def test_fill_writes_what_numpy_writes_whatever_the_strides(case: tuple[np.ndarray, np.ndarray, str]) -> None:
    memory, target, dtype = case
    gpuconst.fill(target, value_of(dtype))
    found = memory.copy()
    memory[:] = noise(memory.size)
    target[...] = element_of(dtype)
    np.testing.assert_array_equal(found, memory)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), max_size=5),
    st.integers(0, 20),
    st.sampled_from(TORCH_DTYPES),
)
@example([(3, 0), (4, 0)], 0, "float32")
@example([(1, 7)] * 64, 3, "bfloat16")
def test_fill_writes_what_torch_writes(dims: list[tuple[int, int]], offset: int, dtype: str) -> None:
    shape, strides = [n for n, _ in dims], [s for _, s in dims]
    length = offset + sum(max(n - 1, 0) * s for n, s in dims) + 9
    found = torch.from_numpy(noise(length * DTYPES[dtype].itemsize))
    expected = found.clone()
    gpuconst.fill(found.view(getattr(torch, dtype)).as_strided(shape, strides, offset), value_of(dtype))
    expected.view(getattr(torch, dtype)).as_strided(shape, strides, offset).fill_(value_of(dtype))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["bool", "float16", "float32", "float64", "complex128"])
def test_fields_of_a_structured_array(dtype: str) -> None:
    """Their strides are no multiple of the itemsize, so DLPack could not name them."""
    records = noise(7 * 30).view([("before", "V5"), ("field", dtype), ("after", f"V{25 - np.dtype(dtype).itemsize}")])
    expected = records.copy()
    expected["field"] = element_of(dtype)
    gpuconst.fill(records["field"], value_of(dtype))
    assert records.tobytes() == expected.tobytes()


def test_fortran_order() -> None:
    x = np.zeros((3, 4, 5), order="F")
    gpuconst.fill(x, 7)
    assert (x == 7).all()


def test_a_writable_broadcast() -> None:
    memory = noise(12).view(np.int32)
    first, _, last = memory
    wide = np.lib.stride_tricks.as_strided(memory[1:2], (1000, 1000, 1000), (0, 0, 0))
    gpuconst.fill(wide, 5)
    assert memory.tolist() == [first, 5, last]


def test_an_exporter_is_told_not_to_copy() -> None:
    x = np.zeros(3)
    gpuconst.fill(CopiesUnlessToldNotTo(x), 7)
    assert x.tolist() == [7, 7, 7]


def test_a_masked_array_keeps_its_mask() -> None:
    x = np.ma.array([1.0, 2.0], mask=[False, True])
    gpuconst.fill(x, 5)
    assert x.data.tolist() == [5, 5]
    assert x.mask.tolist() == [False, True]


class SaysOtherwise(np.ndarray):
    """A subclass with a shape of its own, such as that of what its elements stand for."""

    @property  # type: ignore[misc]
    def shape(self) -> Any:
        return 5, 7


@pytest.mark.parametrize("fill", [gpuconst.fill, lambda x, value: gpuconst.fill_many([x], value)])
def test_a_subclass_is_filled_as_far_as_its_memory_goes(fill: Callable[..., Any]) -> None:
    whole = np.zeros(5)
    fill(whole[1:4].view(SaysOtherwise), 7)
    assert whole.tolist() == [0, 7, 7, 7, 0]


def test_a_memmap(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(40))
    x = np.memmap(path, "<i4", "r+", offset=8, shape=(6,))
    gpuconst.fill(x, 0x01020304)
    x.flush()
    assert path.read_bytes() == bytes(8) + bytes([4, 3, 2, 1]) * 6 + bytes(8)


def test_a_bytearray_can_be_resized_afterwards() -> None:
    x = bytearray(5)
    gpuconst.fill(x, 7)
    x.append(1)
    assert x == bytes([7] * 5 + [1])


@pytest.mark.parametrize("code", "bBhHiIlLqQfd")
def test_an_array_of_the_standard_library(code: str) -> None:
    x = array.array(code, range(5))
    gpuconst.fill(x, 7)
    x.append(1)
    assert x.tolist() == [7] * 5 + [1]


def test_an_mmap_can_be_closed_afterwards() -> None:
    with mmap.mmap(-1, 100) as x:
        gpuconst.fill(x, 255)
        assert x[:] == bytes([255]) * 100


def test_a_ctypes_array() -> None:
    x = (ctypes.c_double * 3 * 2)()
    gpuconst.fill(x, 0.5)
    assert [list(row) for row in x] == [[0.5] * 3] * 2


def test_a_cast_memoryview() -> None:
    memory = bytearray(24)
    gpuconst.fill(memoryview(memory)[4:20].cast("H", (2, 4)), 0xFFFE)
    assert memory == bytes(4) + bytes([0xFE, 0xFF]) * 8 + bytes(4)


def test_bytes_are_the_raw_bits_of_an_element() -> None:
    x = np.zeros((2, 3), np.float32)
    gpuconst.fill(x, b"\x01\x00\xa0\x7f")  # a signalling nan with a payload
    assert (x.view(np.uint32) == 0x7FA00001).all()


@pytest.fixture(params=[True, False], ids=["by words", "by rows"])
def words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the C library's fill of words may be used; where it is none, all is filled by rows."""
    if not request.param:
        monkeypatch.setattr(host_fill, "_wmemset", lambda: None)


LARGE = [
    host_fill.BY_WORDS - 16,
    host_fill.BY_WORDS,
    host_fill.BY_ADDRESS - 16,
    host_fill.BY_ADDRESS + 16,
    31 * host_fill.ROW + 16 * 77,
]


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64", "complex128"])
@pytest.mark.parametrize("nbytes", LARGE)
def test_large_arrays(nbytes: int, dtype: str, offset: int) -> None:
    memory, target = guarded((nbytes // DTYPES[dtype].itemsize,), dtype, offset)
    gpuconst.fill(target, value_of(dtype))
    found = memory.copy()
    memory[:] = noise(memory.size)
    target[...] = element_of(dtype)
    assert np.array_equal(found, memory)


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("more", [1, 2, 3, 77])
def test_large_arrays_that_are_no_number_of_words(more: int) -> None:
    memory, target = guarded((host_fill.BY_ADDRESS + more,), "uint8", 4)
    gpuconst.fill(target, 7)
    assert (target == 7).all()
    assert np.array_equal(memory[: GUARD + 4], noise(GUARD + 4))
    assert np.array_equal(memory[-GUARD:], noise(memory.size)[-GUARD:])


@pytest.mark.parametrize(
    ("element", "word"),
    [
        (b"\x01", 0x01010101),
        (b"\x01\x02", 0x02010201),
        (b"\x01\x02\x03\x04", 0x04030201),
        (b"\x01\x02\x03\x04" * 2, 0x04030201),
        (b"\x01\x02\x03\x04" * 4, 0x04030201),
        (bytes(16), 0),
        (b"\x01\x02\x03\x04\x01\x02\x03\x05", None),
        (b"\x01\x02\x03\x04" * 3 + b"\x01\x02\x03\x05", None),
    ],
)
def test_which_elements_are_made_of_one_word(element: bytes, word: int | None) -> None:
    expected = word if word is None or sys.byteorder == "little" else int.from_bytes(word.to_bytes(4, "little"), "big")
    assert host_fill._word(element) == expected


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("more", [0, 16, host_fill.ROW, 3 * host_fill.ROW + 5 * 16])
@pytest.mark.parametrize(("dtype", "offset"), [("complex128", 3), ("float32", 4)], ids=["rows", "words"])
def test_very_large_arrays_are_filled_by_two_threads(dtype: str, offset: int, more: int) -> None:
    element = np.frombuffer(element_of(dtype).tobytes(), np.uint8)
    memory, target = guarded(((host_fill.SHARED_FROM + more) // element.size,), dtype, offset)
    gpuconst.fill(target, value_of(dtype))
    inside = memory[GUARD + offset : -GUARD].reshape(-1, element.size)
    assert (inside == element).all()
    assert np.array_equal(memory[: GUARD + offset], noise(GUARD + offset))
    assert np.array_equal(memory[-GUARD:], noise(memory.size)[-GUARD:])


@pytest.mark.parametrize(
    ("nbytes", "untouched", "pieces"),
    [
        (host_fill.PIECE, True, 0),
        (host_fill.PIECE + 4, True, 2),
        (host_fill.SHARED_FROM - 4, False, 0),
        (host_fill.SHARED_FROM, False, host_fill.SHARED_FROM // host_fill.PIECE),
    ],
)
def test_memory_that_is_touched_first_is_shared_sooner(
    nbytes: int, untouched: bool, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []
    monkeypatch.setattr(host_fill, "share", lambda tasks: shared.extend(range(len(tasks))))
    x = np.empty(nbytes // 4, np.float32)
    host_fill.fill_stretch(x.ctypes.data, nbytes, bytes(4), untouched=untouched)
    assert len(shared) == pieces


@pytest.mark.parametrize(("value", "element"), [(0.0, bytes(4)), (-0.0, b"\0\0\0\x80")])
def test_very_large_arrays_of_zeros(value: float, element: bytes) -> None:
    memory, target = guarded((host_fill.BY_STREAMING // 4 + 1,), "float32", 1)
    gpuconst.fill(target, value)
    assert (memory[GUARD + 1 : -GUARD].reshape(-1, 4) == np.frombuffer(element, np.uint8)).all()
    assert np.array_equal(memory[: GUARD + 1], noise(GUARD + 1))
    assert np.array_equal(memory[-GUARD:], noise(memory.size)[-GUARD:])


@pytest.mark.parametrize("layout", [lambda a: a[::-1], lambda a: a.T, lambda a: a[:, 1:-1], lambda a: a[:, ::2]])
def test_large_strided_arrays(layout: Callable[[np.ndarray], np.ndarray]) -> None:
    x = np.zeros((500, 700), np.float32)
    expected = x.copy()
    layout(expected)[...] = 0.1
    gpuconst.fill(layout(x), 0.1)
    assert np.array_equal(x, expected)


def test_large_arrays_in_another_order_are_one_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    stretches: list[int] = []
    fill_stretch = host_fill.fill_stretch

    def noted(address: int, nbytes: int, element: bytes, **options: bool) -> None:
        stretches.append(nbytes)
        fill_stretch(address, nbytes, element, **options)

    monkeypatch.setattr(host_fill, "fill_stretch", noted)
    columns = np.zeros((512, 1024), np.float32, order="F")
    gpuconst.fill(columns, 1.5)
    assert (columns == 1.5).all()
    row = np.zeros(1 << 16, np.float32)
    expanded = np.lib.stride_tricks.as_strided(row, (1 << 20, *row.shape), (0, 4))  # 256 GiB to look at
    gpuconst.fill(expanded, 2.5)
    assert (row == 2.5).all()
    assert stretches == [columns.nbytes, row.nbytes]


def test_threads_fill_arrays_of_their_own() -> None:
    wrong: list[int] = []
    sizes = [1, 100, 6400, host_fill.BY_ADDRESS // 4, host_fill.BY_ADDRESS]

    def work(value: int) -> None:
        arrays = [np.zeros(size, np.int32) for size in sizes] + [torch.zeros(10, 10, dtype=torch.int32)]
        for _ in range(50):
            value += 1000
            for x in arrays:
                gpuconst.fill(x, value)
            wrong.extend(value for x in arrays if not (x == value).all())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(value,)) for value in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


class FreshExport:
    """Exports an array of its own each time it is asked, which nobody else holds."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Any]] = []

    def __dlpack__(self, **arguments: Any) -> Any:
        made = np.zeros(4096, np.uint8)
        self.made.append(weakref.ref(made))
        return made.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.mark.parametrize("kind", [FreshBuffer, FreshExport])
def test_memory_is_held_while_it_is_looked_at_and_no_longer(kind: type[Any]) -> None:
    x = kind()
    view = view_of(x)
    gc.collect()
    made = x.made[-1]
    assert made() is not None
    assert view.address
    del view
    gc.collect()
    assert made() is None


@pytest.mark.gpu
def test_a_pinned_tensor() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    x = torch.zeros(3, 5).pin_memory()
    gpuconst.fill(x, 0.5)
    assert (x == 0.5).all()
