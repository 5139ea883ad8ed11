"""Hand-over to frameworks: through the import function of each, and refused where it would copy."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .torch_rules import has_memory

__all__ = ["to_cupy", "to_jax", "to_tensorflow", "to_torch"]


def to_torch(array: Any) -> Any:
    """Return a torch tensor that shares the array's memory."""
    torch, dtype = _import("torch", "torch"), array._dtype
    if not hasattr(torch, dtype.name):
        raise TypeError(f"torch {torch.__version__} has no dtype {dtype.name}; to_numpy() and to_jax() take it")
    on_cpu = array.device == "cpu"
    if on_cpu and dtype.native:  # faster than making and reading a capsule
        tensor = torch.from_numpy(array._exporter)
    else:
        # A ready capsule spares torch its Python calls on a CPU array: half of the time.
        tensor = torch.from_dlpack(array.__dlpack__() if on_cpu else array)
    if type(tensor) is not torch.Tensor and not has_memory(tensor):
        raise BufferError(
            "torch makes fake tensors here, which have no memory; hand the array over before, or use torch.full"
        )
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        address = 0
    if address != array.data_ptr() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch.from_dlpack(array.__dlpack__())  # transforms, such as grad, do not wrap what a capsule holds
        address = tensor.data_ptr()
    _check_shared(array, address, "torch", "while it traces, use torch.full; else, ")
    return tensor


def to_jax(array: Any) -> Any:
    """Return a JAX array that shares the array's memory."""
    jax, dtype = _import("jax", "jax"), array._dtype
    canonical = jax.dtypes.canonicalize_dtype(dtype.numpy)
    if canonical != dtype.numpy:
        raise TypeError(
            f"JAX would copy {dtype.name} to {canonical}, because 64-bit types are off; "
            f"pass dtype={str(canonical)!r}, or enable them: jax.config.update('jax_enable_x64', True)"
        )
    shared = jax.dlpack.from_dlpack(array)
    _check_shared(array, shared.unsafe_buffer_pointer(), "JAX")
    return shared


def to_tensorflow(array: Any) -> Any:
    """Return a TensorFlow tensor that shares the array's memory; the fill must have finished."""
    tensorflow = _import("tensorflow", "tensorflow")
    if array._dtype.name.startswith("float8"):
        raise TypeError(
            f"TensorFlow does not import {array._dtype.name} through DLPack; use to_jax(), or copy it, "
            "if TensorFlow has the dtype: tensorflow.constant(x.to_numpy())"
        )
    if array.device != "cpu" and not tensorflow.config.list_physical_devices("GPU"):
        # TensorFlow would refuse it too, but only after freeing the capsule, which its owner then frees again.
        raise BufferError("this TensorFlow can use no GPU; copy the array: tensorflow.constant(x.to_numpy())")
    return tensorflow.experimental.dlpack.from_dlpack(array.__dlpack__())


def to_cupy(array: Any) -> Any:
    """Return a CuPy array that shares the array's memory."""
    if array.device == "cpu":
        raise BufferError(
            "CuPy holds CUDA memory only, and this array is on the CPU; "
            "fill with device='cuda', or copy it: cupy.asarray(x.to_numpy())"
        )
    cupy = _import("cupy", "cuda12' or 'gpuconst[cuda13")
    if array._dtype.name.startswith("float8"):
        raise TypeError(f"CuPy has no dtype {array._dtype.name}; fill with 'uint8' and the raw bits, or use to_jax()")
    shared = cupy.from_dlpack(array)
    _check_shared(array, shared.data.ptr, "CuPy")
    return shared


def _import(name: str, extra: str) -> Any:
    module = sys.modules.get(name)  # None if importing it is forbidden
    if module is not None:
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"{name} is not installed; pip install 'gpuconst[{extra}]'", name=name) from error


def _check_shared(array: Any, address: int, consumer: str, way_out: str = "") -> None:
    if address != array.data_ptr() and array.size:
        raise BufferError(
            f"{consumer} copied the array ({array.data_ptr():#x} became {address:#x}); {way_out}to accept a copy, "
            "use its own conversion of to_numpy()"
        )
