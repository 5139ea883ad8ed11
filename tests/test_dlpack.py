"""The exporter: what its capsules say, who takes which, and that nobody loses memory over it."""

import ctypes
import math
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lying_capsules import DLManagedTensor, DLManagedTensorVersioned, DLPackOnly

import gpuconst
from gpuconst.dlpack import read_capsule, retag
from gpuconst.dtypes import DTYPES

full = partial(gpuconst.full, device="cpu")

NATIVE = [name for name, row in DTYPES.items() if row.native]
EXTENDED = [name for name, row in DTYPES.items() if not row.native]
FLOAT8 = [name for name in EXTENDED if name != "bfloat16"]
COMPLEX = ["complex64", "complex128"]
TORCH_LACKS = ["float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"]
SIXTY_FOUR_BITS = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
KIB, MIB = 1 << 10, 1 << 20

#: DLDataTypeCode and bits.
CODES = {
    "bool": (6, 8),
    **{f"int{bits}": (0, bits) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (1, bits) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": (2, bits) for bits in (16, 32, 64)},
    "complex64": (5, 64),
    "complex128": (5, 128),
    "bfloat16": (4, 16),
    "float8_e3m4": (7, 8),
    "float8_e4m3": (8, 8),
    "float8_e4m3b11fnuz": (9, 8),
    "float8_e4m3fn": (10, 8),
    "float8_e4m3fnuz": (11, 8),
    "float8_e5m2": (12, 8),
    "float8_e5m2fnuz": (13, 8),
    "float8_e8m0fnu": (14, 8),
}
READ_ONLY, IS_COPIED = 1, 2


def pointer(capsule: Any, name: bytes) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, name))


def legacy(capsule: Any) -> DLManagedTensor:
    return DLManagedTensor.from_address(pointer(capsule, b"dltensor"))


def versioned(capsule: Any) -> DLManagedTensorVersioned:
    return DLManagedTensorVersioned.from_address(pointer(capsule, b"dltensor_versioned"))


class Held:
    """A capsule as an exporter, for consumers that take no capsules."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


# What a capsule says


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (1, 3, 1), (0,), (2, 0)], ids=str)
def test_what_a_capsule_says(dtype: str, shape: tuple[int, ...]) -> None:
    array = full(shape, 1, dtype=dtype)
    old, new = array.__dlpack__(), array.__dlpack__(max_version=(1, 1))
    assert (versioned(new).major, versioned(new).flags) == (1, 0)
    for tensor in [legacy(old).tensor, versioned(new).tensor]:
        assert tensor.data == array.data_ptr()
        assert tensor.byte_offset == 0
        assert (tensor.device_type, tensor.device_id) == array.__dlpack_device__() == (1, 0)
        assert (tensor.code, tensor.bits, tensor.lanes) == (*CODES[dtype], 1)
        assert tuple(tensor.shape[: tensor.ndim]) == shape
        if shape and array.size:
            assert tensor.strides[: tensor.ndim] == [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("max_version", [None, (0, 0), (0, 8)])
def test_a_consumer_of_old_gets_a_legacy_capsule(dtype: str, max_version: tuple[int, int] | None) -> None:
    assert legacy(full(1, 1, dtype=dtype).__dlpack__(max_version=max_version)).deleter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("max_version", [(1, 0), (1, 1), (1, 99), (2, 0), (100, 3)])
def test_a_consumer_of_today_gets_a_versioned_capsule(dtype: str, max_version: tuple[int, int]) -> None:
    assert versioned(full(1, 1, dtype=dtype).__dlpack__(max_version=max_version)).major == 1


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("copy", [None, True])
def test_float8_is_of_dlpack_1_1(dtype: str, copy: bool | None) -> None:
    assert versioned(full(1, 1, dtype=dtype).__dlpack__(max_version=(1, 1), copy=copy)).minor >= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex128"])
@pytest.mark.parametrize("dl_device", [None, (1, 0)])
@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_a_copy_that_is_asked_for(
    dtype: str, dl_device: tuple[int, int] | None, max_version: tuple[int, int] | None
) -> None:
    array = full((300, 5), 1, dtype=dtype)
    capsule = array.__dlpack__(copy=True, dl_device=dl_device, max_version=max_version)
    tensor = legacy(capsule).tensor if max_version is None else versioned(capsule).tensor
    assert (tensor.code, tensor.bits) == CODES[dtype]
    assert tuple(tensor.shape[: tensor.ndim]) == array.shape
    assert tensor.data % 256 == 0
    assert not array.data_ptr() <= tensor.data < array.data_ptr() + array.nbytes
    assert ctypes.string_at(tensor.data, array.nbytes) == array.to_numpy().tobytes()
    if max_version is not None:
        assert versioned(capsule).flags == IS_COPIED


@pytest.mark.parametrize(
    "arguments", [{"copy": False}, {"dl_device": (1, 0)}, {"dl_device": [1, 0]}, {"dl_device": (1, 0), "copy": False}]
)
def test_no_copy_where_none_is_needed(arguments: dict[str, Any]) -> None:
    array = full(5, 1, dtype="bfloat16")
    capsule = array.__dlpack__(max_version=(1, 0), **arguments)
    assert versioned(capsule).tensor.data == array.data_ptr()
    assert versioned(capsule).flags == 0


@pytest.mark.parametrize("dl_device", [(2, 0), (10, 0), (1, 1)])
@pytest.mark.parametrize("copy", [None, True, False])
def test_a_device_it_cannot_go_to(dl_device: tuple[int, int], copy: bool | None) -> None:
    words = f"from DLPack device (1, 0) to {dl_device}; only to (1, 0)"
    with pytest.raises(BufferError, match=f"{re.escape(words)}$"):
        full(1, 1).__dlpack__(dl_device=dl_device, copy=copy)


@pytest.mark.parametrize("stream", [0, 1, -1])
def test_a_stream_for_host_memory(stream: int) -> None:
    with pytest.raises(RuntimeError, match=rf"stream={stream} was given, but the memory is on the CPU"):
        full(1, 1).__dlpack__(stream=stream)


def test_host_memory_has_no_cuda_array_interface() -> None:
    assert not hasattr(full(1, 1), "__cuda_array_interface__")


# Who takes what: the memory itself, or a refusal; a silent copy fails every one of these


SHAPES = [(2, 3), (), (0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_to_numpy(dtype: str, shape: tuple[int, ...]) -> None:
    array = full(shape, 1, dtype=dtype)
    taken = array.to_numpy()
    assert (taken.shape, taken.dtype, taken.ctypes.data) == (shape, DTYPES[dtype].numpy, array.data_ptr())


@pytest.mark.parametrize("dtype", NATIVE)
def test_numpy_imports(dtype: str) -> None:
    array = full((2, 3), 1, dtype=dtype)
    taken = np.from_dlpack(array)
    assert (taken.dtype, taken.ctypes.data) == (np.dtype(dtype), array.data_ptr())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in TORCH_LACKS])
def test_to_torch(dtype: str, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    array = full(shape, 1, dtype=dtype)
    for taken in [array.to_torch(), torch.from_dlpack(array), torch.from_dlpack(array.__dlpack__())]:
        assert (tuple(taken.shape), taken.dtype, str(taken.device)) == (shape, getattr(torch, dtype), "cpu")
        assert taken.data_ptr() == (array.data_ptr() if array.size else 0)
        assert taken.is_contiguous()
        assert (taken.to(torch.complex128) == 1).all()


@pytest.mark.parametrize("dtype", TORCH_LACKS)
def test_torch_lacks(dtype: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(TypeError, match=rf"torch .* has no dtype {dtype}; to_numpy\(\) and to_jax\(\) take it"):
        full(1, 1, dtype=dtype).to_torch()


@pytest.fixture
def x64() -> Any:
    """Switch on 64-bit types in JAX."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_to_jax(dtype: str, shape: tuple[int, ...]) -> None:
    jnp = pytest.importorskip("jax.numpy")
    array = full(shape, 1, dtype=dtype)
    for taken in [array.to_jax(), jnp.from_dlpack(array)]:
        assert (taken.shape, taken.dtype) == (shape, DTYPES[dtype].numpy)
        assert not array.size or taken.unsafe_buffer_pointer() == array.data_ptr()
        assert (np.asarray(taken).astype(np.complex128) == 1).all()


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in SIXTY_FOUR_BITS])
def test_to_jax_without_64_bit_types(dtype: str) -> None:
    pytest.importorskip("jax")
    array = full((2, 3), 1, dtype=dtype)
    assert array.to_jax().unsafe_buffer_pointer() == array.data_ptr()


@pytest.mark.parametrize(("dtype", "narrow"), SIXTY_FOUR_BITS.items())
def test_jax_would_narrow(dtype: str, narrow: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("jax")
    array = full(2, 1, dtype=dtype)
    with pytest.raises(TypeError, match=rf"pass dtype='{narrow}', or .*jax.config.update\('jax_enable_x64', True\)"):
        array.to_jax()
    assert full(2, 1, dtype=narrow).to_jax().dtype == narrow
    request.getfixturevalue("x64")
    assert array.to_jax().dtype == dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*NATIVE, "bfloat16"])
def test_to_tensorflow(dtype: str, shape: tuple[int, ...]) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    array = full(shape, 1, dtype=dtype)
    taken = array.to_tensorflow()
    assert (tuple(taken.shape), taken.dtype) == (shape, getattr(tensorflow, dtype))
    assert (taken.numpy().astype(np.complex128) == 1).all()
    back = tensorflow.experimental.dlpack.to_dlpack(taken)
    assert not array.size or legacy(back).tensor.data == array.data_ptr()


def test_tensorflow_computes_on_the_memory() -> None:
    tensorflow = pytest.importorskip("tensorflow")
    array = full((64, 64), 0.5)  # on less than 64-byte alignment a matmul aborts the process
    assert (tensorflow.linalg.matmul(array.to_tensorflow(), array.to_tensorflow()).numpy() == 16).all()


@pytest.mark.parametrize("dtype", FLOAT8)
def test_tensorflow_lacks(dtype: str) -> None:
    pytest.importorskip("tensorflow")
    array = full(2, 1, dtype=dtype)
    with pytest.raises(TypeError, match=rf"does not import {dtype} .*; use to_jax\(\), or copy it"):
        array.to_tensorflow()
    assert array.to_jax().dtype == DTYPES[dtype].numpy
    assert full(2, 1, dtype="bfloat16").to_tensorflow().shape == (2,)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in COMPLEX])
def test_tvm_ffi(dtype: str) -> None:
    tvm_ffi = pytest.importorskip("tvm_ffi")
    array = full((2, 3), 1, dtype=dtype)
    taken = tvm_ffi.from_dlpack(array)
    assert (tuple(taken.shape), str(taken.dtype), taken.data_ptr()) == ((2, 3), dtype, array.data_ptr())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
def test_cupy_holds_no_host_memory(dtype: str) -> None:
    with pytest.raises(BufferError, match=r"this array is on the CPU; fill with device='cuda', or copy it"):
        full(1, 1, dtype=dtype).to_cupy()


def test_consumers_that_ask_for_a_copy() -> None:
    torch = pytest.importorskip("torch")
    array = full(1000, 1.0)
    copies = [torch.from_dlpack(array, copy=True), np.from_dlpack(array, copy=True)]
    array.to_numpy()[...] = 2
    assert all((np.asarray(copy) == 1).all() for copy in copies)


BLOCKED = """
import sys, importlib.abc, gpuconst

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
CALL = """
try:
    gpuconst.full(1, 1.0, device="cpu").to_{name}()
except ImportError as error:
    print(type(error).__name__, error.name, error)
"""


FORBIDDEN = "import sys, gpuconst; sys.modules[{name!r}] = None"


@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow"])
@pytest.mark.parametrize("absent", [BLOCKED, FORBIDDEN], ids=["not found", "forbidden"])
def test_a_framework_that_is_not_installed(run_python: Callable[..., str], absent: str, name: str) -> None:
    printed = run_python((absent + CALL).format(name=name))
    assert printed == f"ImportError {name} {name} is not installed; pip install 'gpuconst[{name}]'"


def test_a_framework_whose_installation_is_broken(run_python: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("import a_part_of_it")
    printed = run_python("import gpuconst" + CALL.format(name="jax"), PYTHONPATH=str(tmp_path))
    assert printed == "ModuleNotFoundError a_part_of_it No module named 'a_part_of_it'"


# Nobody loses memory over it


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("only Linux tells a process its own size")
    return int(statm.read_text().split()[1]) * 4096


def torch_rejects(array: gpuconst.Array) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_dlpack(array)


def tensorflow_rejects(array: gpuconst.Array) -> Any:
    tensorflow = pytest.importorskip("tensorflow")
    return tensorflow.experimental.dlpack.from_dlpack(array.__dlpack__())


def cupy_rejects(array: gpuconst.Array) -> Any:
    cupy = pytest.importorskip("cupy")
    return cupy.from_dlpack(array.__dlpack__())


@pytest.mark.parametrize("reject", [np.from_dlpack, torch_rejects, tensorflow_rejects, cupy_rejects])
def test_a_consumer_that_rejects_a_capsule_says_why_and_leaks_nothing(reject: Callable[[Any], Any]) -> None:
    before = resident()
    messages = set()
    for _ in range(100):
        array = full(4 * MIB, 1, dtype="float8_e3m4")
        with pytest.raises(Exception, match=".") as caught:
            reject(array)
        assert not isinstance(caught.value, SystemError)
        messages.add(str(caught.value))
        del array, caught
    assert len(messages) == 1
    assert resident() - before < 64 * MIB  # and not 400


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_version", [None, (1, 1)])
@pytest.mark.parametrize("copy", [None, True])
def test_a_capsule_that_nobody_consumes(dtype: str, max_version: tuple[int, int] | None, copy: bool | None) -> None:
    before = resident()
    for _ in range(50):
        full(4 * MIB // DTYPES[dtype].itemsize, 1, dtype=dtype).__dlpack__(max_version=max_version, copy=copy)
    assert resident() - before < 64 * MIB  # and not 200


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_version", [None, (1, 1)])
def test_a_hundred_thousand_exports(dtype: str, max_version: tuple[int, int] | None) -> None:
    array = full(10, 1, dtype=dtype)
    array.__dlpack__(max_version=max_version)
    before = resident()
    for _ in range(100_000):
        array.__dlpack__(max_version=max_version)
    assert resident() - before < 4 * MIB


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_a_capsule_outlives_the_array(max_version: tuple[int, int] | None) -> None:
    array = full(256, 0.5)
    start, end, capsule = array.data_ptr(), array.data_ptr() + array.nbytes, array.__dlpack__(max_version=max_version)
    del array
    later = [full(256, 2.0) for _ in range(5000)]
    assert all(other.data_ptr() >= end or other.data_ptr() + other.nbytes <= start for other in later)
    assert (np.from_dlpack(Held(capsule)) == 0.5).all()


def test_a_capsule_is_consumed_once() -> None:
    held = Held(full(256, 0.5).__dlpack__(max_version=(1, 0)))
    first = np.from_dlpack(held)
    for _ in range(100):
        with pytest.raises(ValueError, match="PyCapsule"):
            np.from_dlpack(held)
    assert (first == 0.5).all()


def test_threads_that_export_at_once() -> None:
    array, wrong = full(16, 1, dtype="bfloat16"), []

    def work() -> None:
        for _ in range(3000):
            tensor = versioned(capsule := array.__dlpack__(max_version=(1, 1))).tensor
            if (tensor.code, tensor.bits, tensor.data) != (*CODES["bfloat16"], array.data_ptr()):
                wrong.append(capsule)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "tensorflow"])
def test_the_interpreter_exits_with_live_references(run_python: Callable[..., str], framework: str) -> None:
    pytest.importorskip(framework)
    printed = run_python(
        f"""
        import gpuconst
        arrays = [gpuconst.full(size, 0.5, dtype=dtype, device="cpu")
                  for size in (10, 10_000_000) for dtype in ("float32", "bfloat16")]
        taken = [array.to_{framework}() for array in arrays]
        capsules = [array.__dlpack__(max_version=version) for array in arrays for version in (None, (1, 1))]
        cycle = [arrays, taken, capsules]
        cycle.append(cycle)
        print("reached the end")
        """
    )
    assert printed == "reached the end"


# Capsules that are not what they should be


def test_other_code_may_call_pythons_capsule_functions_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.pythonapi.PyCapsule_GetPointer, "restype", ctypes.c_int)
    monkeypatch.setattr(ctypes.pythonapi.PyCapsule_GetPointer, "argtypes", [ctypes.c_void_p, ctypes.c_void_p])
    array = full(3, 1, dtype="bfloat16")
    assert gpuconst.shares_memory(DLPackOnly(array), array)


def test_a_carrier_that_breaks_its_promise() -> None:
    with pytest.raises(BufferError, match="the carrier exported type .* for bfloat16"):
        retag(np.zeros(1, "float32").__dlpack__(), DTYPES["bfloat16"], None)


@pytest.mark.parametrize(("dtype", "minor", "kept"), [("bfloat16", 0, 0), ("float8_e5m2", 0, 1), ("float8_e5m2", 9, 9)])
def test_a_corrected_capsule_keeps_its_flags_and_a_version_that_suffices(dtype: str, minor: int, kept: int) -> None:
    capsule = np.zeros(1, DTYPES[dtype].carrier).__dlpack__(max_version=(1, 1))
    managed = versioned(capsule)
    managed.minor, managed.flags = minor, 4
    retag(capsule, DTYPES[dtype], (1, 1), copied=True)
    assert (managed.major, managed.minor, managed.flags) == (1, kept, 4 | IS_COPIED)


def test_reading_what_is_no_capsule() -> None:
    for capsule in [None, object(), 3]:
        with pytest.raises(BufferError, match="is not an unconsumed DLPack capsule"):
            read_capsule(capsule)


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_reading_a_consumed_capsule(max_version: tuple[int, int] | None) -> None:
    held = Held(full(1, 1).__dlpack__(max_version=max_version))
    np.from_dlpack(held)
    with pytest.raises(BufferError, match="is not an unconsumed DLPack capsule"):
        read_capsule(held.capsule)


def test_reading_a_capsule_of_the_future() -> None:
    capsule = full(1, 1).__dlpack__(max_version=(1, 0))
    versioned(capsule).major = 2
    with pytest.raises(BufferError, match="DLPack 2.x, understood is 1.x"):
        read_capsule(capsule)
