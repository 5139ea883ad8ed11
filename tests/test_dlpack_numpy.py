"""NumPy's own tests of a DLPack exporter, from its wheel, on gpuconst's."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import numpy as np
import pytest

import gpuconst
from gpuconst.dtypes import DTYPES

NATIVE = [name for name, row in DTYPES.items() if row.native]

full = partial(gpuconst.full, device="cpu")
numpys = pytest.importorskip("numpy._core.tests.test_dlpack", reason="this NumPy comes without its tests")


def exported(values: Any) -> gpuconst.Array:
    """Return an array of gpuconst that holds what a NumPy array does."""
    array = full(values.shape, 0, dtype=values.dtype)
    array.to_numpy()[...] = values
    return array


class Constructors:
    """NumPy, but its new arrays are gpuconst's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def arange(self, stop: int) -> gpuconst.Array:
        return exported(np.arange(stop))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> gpuconst.Array:
        return exported(np.zeros(shape, dtype))

    def array(self, value: Any) -> Any:
        return exported(np.array(value)) if isinstance(value, float) else np.array(value)


class Castable:
    """What NumPy's test casts to the dtype it is about."""

    def astype(self, dtype: Any) -> gpuconst.Array:
        return exported(np.arange(5).astype(dtype))


class OldExporter:
    """An array of gpuconst behind the protocol of before DLPack 1.0."""

    def __init__(self) -> None:
        self.array = exported(np.arange(5))

    def __dlpack__(self, stream: None = None) -> Any:
        return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class TestAsNumPyTestsItself(numpys.TestDLPack):  # type: ignore[misc, name-defined]
    @pytest.fixture(autouse=True)
    def _exporters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(numpys, "np", Constructors())
        monkeypatch.setattr(numpys, "new_and_old_dlpack", lambda: (exported(np.arange(5)), OldExporter()))

    @pytest.mark.parametrize("dtype", NATIVE)
    def test_dtype_passthrough(self, dtype: str) -> None:
        super().test_dtype_passthrough(Castable(), dtype)

    # From NumPy 2.5 on it asks for a message about NumPy; test_a_stream_for_host_memory is ours.
    test_dunder_dlpack_stream = None
    # A capsule keeps the memory alive, and not the Array.
    test_dunder_dlpack_refcount = None
    test_from_dlpack_refcount = None
    # An Array is contiguous, writable and of a dtype that DLPack knows, always.
    test_strides_not_multiple_of_itemsize = None
    test_non_contiguous = None
    test_size1dims_arrays = None
    test_readonly = None
    test_invalid_dtype = None
    test_invalid_byte_swapping = None


def test_numpys_tests_are_run_on_our_exporter() -> None:
    ran = {name for name, test in inspect.getmembers(TestAsNumPyTestsItself) if name.startswith("test") and test}
    assert {"test_dunder_dlpack_copy", "test_copy", "test_writeable", "test_device", "test_ndim0"} <= ran
    assert isinstance(Constructors().arange(5), gpuconst.Array)
