"""Every name that a dtype goes by."""

import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpuconst
from gpuconst.dtypes import DTYPES

NATIVE = [name for name, row in DTYPES.items() if row.native]
EXTENDED = [name for name, row in DTYPES.items() if not row.native]


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that an array of gpuconst gets."""
    array = gpuconst.full((), 1, dtype=dtype, device="cpu")
    assert array.to_numpy().dtype == array.dtype
    return array.dtype


def test_the_table_is_whole() -> None:
    assert sorted(DTYPES) == [
        *["bfloat16", "bool", "complex128", "complex64", "float16", "float32", "float64"],
        *["float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"],
        *["float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"],
        *["int16", "int32", "int64", "int8", "uint16", "uint32", "uint64", "uint8"],
    ]


@pytest.mark.parametrize("name", NATIVE)
def test_a_numpy_dtype_by_every_name(name: str) -> None:
    expected = np.dtype(name)
    for spelling in [name, expected, expected.type, expected.str, expected.char, expected.newbyteorder("=")]:
        assert dtype_of(spelling) == expected


@pytest.mark.parametrize("name", EXTENDED)
def test_an_ml_dtypes_format_by_every_name(name: str) -> None:
    expected = np.dtype(getattr(ml_dtypes, name))
    for spelling in [name, expected, expected.type]:
        assert dtype_of(spelling) == expected


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (bool, "bool"),
        (int, "int64"),
        (float, "float64"),  # as everywhere in NumPy
        (complex, "complex128"),
        ("f4", "float32"),
        (np.str_("f4"), "float32"),
        ("half", "float16"),
        ("double", "float64"),
        (np.longlong, "int64"),
        (np.intc, "int32"),
        (np.dtype("longlong"), "int64"),
    ],
)
def test_the_other_names_that_numpy_knows(spelling: Any, name: str) -> None:
    assert dtype_of(spelling) == np.dtype(name)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bfloat16", *NATIVE])
def test_a_torch_dtype(name: str) -> None:
    torch = pytest.importorskip("torch")
    assert dtype_of(getattr(torch, name)) == DTYPES[name].numpy


@pytest.mark.parametrize("spelling", ["half", "float", "double", "int", "long", "short", "cfloat"])
def test_another_name_that_torch_has(spelling: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, spelling)
    assert dtype_of(dtype) == torch.ones((), dtype=dtype).numpy().dtype


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_jax_dtype(name: str) -> None:
    jnp = pytest.importorskip("jax.numpy")
    assert dtype_of(getattr(jnp, "bool_" if name == "bool" else name)) == DTYPES[name].numpy


@pytest.mark.parametrize("name", ["bfloat16", *NATIVE])
def test_a_tensorflow_dtype(name: str) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    assert dtype_of(getattr(tensorflow, name)) == DTYPES[name].numpy


def test_dtypes_of_frameworks_are_recognised_by_what_is_imported(run_python: Callable[..., str]) -> None:
    loaded = run_python(
        """
        import sys, gpuconst
        for dtype in ["float32", "bfloat16", "f4", float]:
            gpuconst.full(1, 1, dtype=dtype, device="cpu")
        try:
            gpuconst.full(1, 1, dtype="torch.float32", device="cpu")
        except TypeError:
            pass
        print(sorted({"torch", "jax", "tensorflow", "cupy", "numba", "keras"} & set(sys.modules)))
        """
    )
    assert loaded == "[]"


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_framework_that_another_thread_is_still_importing(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, framework, ModuleType(framework))
    assert dtype_of("f4") == np.float32


@pytest.mark.parametrize("name", [name for name in NATIVE if np.dtype(name).itemsize > 1])
def test_foreign_byte_order(name: str) -> None:
    foreign = np.dtype(name).newbyteorder("S")
    for spelling in [foreign, foreign.str]:
        with pytest.raises(TypeError, match=f"'{foreign.str}' is not in this machine's byte order; pass '{name}'"):
            gpuconst.full(1, 1, dtype=spelling, device="cpu")
    with pytest.raises(TypeError, match=r"or of an array x\.astype\('(.*)'\)$") as caught:
        gpuconst.fill(np.ones(2, foreign), 1)
    gpuconst.fill(np.ones(2, foreign).astype(str(caught.value).split("'")[-2]), 1)


@pytest.mark.parametrize(
    "dtype",
    [
        "float31",
        "",
        "int4",
        "float128",
        "complex256",
        "torch.float32",
        object,
        str,
        np.floating,
        np.generic,
        np.dtype("U3"),
        np.dtype(">U3"),
        np.dtype("M8[s]"),
        np.dtype([("x", "f4")]),
        np.dtype([("x", ">f4")]),
        np.dtype(("f4", 2)),
        ml_dtypes.int4,
        ml_dtypes.float4_e2m1fn,
        4,
        ["float32"],
        "f4,(",
        "4(",
        ("f4", -1),
        {},
        gpuconst,
    ],
    ids=lambda dtype: f"{dtype!s:.30}",
)
def test_an_unknown_dtype_is_told_the_known_ones(dtype: Any) -> None:
    listed = re.escape(f"unknown dtype {dtype!r}; ") + ".*the dtypes are bool, int8, .*float8_e8m0fnu"
    with pytest.raises(TypeError, match=listed):
        gpuconst.full(1, 1, dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    ("spelling", "meant"),
    [
        ("bf16", "bfloat16"),
        ("torch.int8", "int8"),
        ("Int8", "int8"),
        ("float8_e5", "float8_e5m2', 'float8_e5m2fnuz"),
    ],
)
def test_a_misspelt_dtype_is_told_the_nearest(spelling: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"unknown dtype '{spelling}'; did you mean '{meant}'. the dtypes are bool, "):
        gpuconst.full(3, 1, dtype=spelling)


def test_a_dtype_of_a_framework_is_not_misspelt() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"unknown dtype torch\.quint8; the dtypes are bool, "):
        gpuconst.full(3, 1, dtype=torch.quint8)


@pytest.mark.parametrize("spelling", ["", "torch."])
def test_a_dtype_without_a_name_is_near_to_none(spelling: str) -> None:
    with pytest.raises(TypeError, match=f"unknown dtype '{re.escape(spelling)}'; the dtypes are bool, "):
        gpuconst.full(3, 1, dtype=spelling)


@pytest.mark.parametrize("name", ["qint8", "string", "resource", "variant"])
def test_an_unknown_dtype_of_tensorflow(name: str) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    with pytest.raises(TypeError, match="unknown dtype"):
        gpuconst.full(1, 1, dtype=getattr(tensorflow, name), device="cpu")


@pytest.mark.parametrize("name", ["qint8", "bits8", "complex32"])
def test_an_unknown_dtype_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="unknown dtype"):
        gpuconst.full(1, 1, dtype=getattr(torch, name), device="cpu")


def test_a_tensor_is_no_dtype() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"unknown dtype tensor\(\[0., 0.\]\); the dtypes are bool"):
        gpuconst.full(1, 1, dtype=torch.zeros(2), device="cpu")


@pytest.mark.parametrize("make", [gpuconst.zeros, gpuconst.ones])
def test_zeros_and_ones_are_float32_unless_told(make: Callable[..., gpuconst.Array]) -> None:
    assert make(1, device="cpu").dtype == np.float32
    assert make(1, dtype=None, device="cpu").dtype == np.float32
    assert make(1, dtype="int8", device="cpu").dtype == np.int8
