"""How each library fills a tensor on a GPU: functions that take a tensor and a value and return the call to time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.cases.cuda_memory import DTYPES
from benchmarks.contest import MissingError


def gpuconst_fill(tensor: Any, value: float) -> Callable[[], Any]:
    """Fill through `gpuconst.fill`."""
    import gpuconst

    return functools.partial(gpuconst.fill, tensor, value)


def torch_fill(tensor: Any, value: float) -> Callable[[], Any]:
    """Fill through ``torch.Tensor.fill_``."""
    return functools.partial(tensor.fill_, value)


def cupy_fill(tensor: Any, value: float) -> Callable[[], Any]:
    """Fill through ``cupy.ndarray.fill``."""
    import cupy

    return functools.partial(cupy.from_dlpack(tensor).fill, value)


def numba_assign(tensor: Any, value: float) -> Callable[[], Any]:
    """Fill by assigning a scalar, which waits for the device."""
    from numba import cuda

    as_cuda_array: Any = cuda.as_cuda_array
    return functools.partial(as_cuda_array(tensor).__setitem__, slice(None), value)


def memset(tensor: Any, value: float) -> Callable[[], Any]:
    """Fill through the driver's own memset, the ceiling.

    Raises
    ------
    MissingError
        If the driver has no memset for the tensor: elements of 8 or 16 bytes, or gaps between them.
    """
    import numpy as np
    from cuda.bindings import driver

    calls = {1: driver.cuMemsetD8Async, 2: driver.cuMemsetD16Async, 4: driver.cuMemsetD32Async}
    if tensor.itemsize not in calls or not tensor.is_contiguous():
        raise MissingError("the driver fills elements of 1, 2 and 4 bytes without gaps")
    element = np.array(value, DTYPES[tensor.itemsize][0]).tobytes()
    call = functools.partial(
        calls[tensor.itemsize], tensor.data_ptr(), int.from_bytes(element, "little"), tensor.numel(), 0
    )
    status = call()[0]
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"memset returned {status}")
    return call
