"""The cost of exporting an array and of handing it to a framework, compared with a NumPy array."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.contest import VALUE, Case, Contender, Row

_LENGTH = 1024
_NEWEST = (1, 2)

Maker = Callable[[Any], Callable[[], Any]]


class _Step(NamedTuple):
    """A way to hand an array over: functions that take the array and return the call to time."""

    dtype: str
    ours: Maker
    theirs: Maker


def _source(dtype: str) -> Any:
    import gpuconst

    return gpuconst.full((_LENGTH,), VALUE, dtype=dtype, device="cpu")


def _array(step: str) -> Callable[[], Any]:
    return _STEPS[step].ours(_source(_STEPS[step].dtype))


def _ndarray(step: str) -> Callable[[], Any]:
    import numpy as np

    source = _source(_STEPS[step].dtype).to_numpy()  # aligned, or JAX would copy
    # NumPy does not export bfloat16: its bits travel as unsigned integers of that width.
    return _STEPS[step].theirs(source.view(np.uint16) if source.itemsize == 2 else source)


def _export(source: Any) -> Callable[[], Any]:
    run: Callable[[], Any] = source.__dlpack__
    return run


def _export_versioned(source: Any) -> Callable[[], Any]:
    return functools.partial(source.__dlpack__, max_version=_NEWEST)


def _method(name: str) -> Maker:
    return operator.attrgetter(name)


def _torch_from_numpy(source: Any) -> Callable[[], Any]:
    import torch

    return functools.partial(torch.from_numpy, source)


def _torch_from_bits(source: Any) -> Callable[[], Any]:
    import torch

    return lambda: torch.from_numpy(source).view(torch.bfloat16)


def _torch_from_dlpack(source: Any) -> Callable[[], Any]:
    from torch.utils.dlpack import from_dlpack

    return functools.partial(from_dlpack, source)


def _numpy_from_dlpack(source: Any) -> Callable[[], Any]:
    import numpy as np

    return functools.partial(np.from_dlpack, source)


def _jax_from_dlpack(source: Any) -> Callable[[], Any]:
    import jax.dlpack

    return functools.partial(jax.dlpack.from_dlpack, source)


def _tensorflow_from_dlpack(source: Any) -> Callable[[], Any]:
    import tensorflow as tf

    return lambda: tf.experimental.dlpack.from_dlpack(source.__dlpack__())


_STEPS = {
    "export": _Step("float32", _export, _export),
    "export, versioned": _Step("float32", _export_versioned, _export_versioned),
    "export of bfloat16": _Step("bfloat16", _export, _export),
    "export of bfloat16, versioned": _Step("bfloat16", _export_versioned, _export_versioned),
    "torch.from_dlpack(it)": _Step("float32", _torch_from_dlpack, _torch_from_dlpack),
    "np.from_dlpack(it)": _Step("float32", _numpy_from_dlpack, _numpy_from_dlpack),
    "to NumPy": _Step("float32", _method("to_numpy"), _method("view")),
    "to torch": _Step("float32", _method("to_torch"), _torch_from_numpy),
    "to torch, bfloat16": _Step("bfloat16", _method("to_torch"), _torch_from_bits),
    "to JAX": _Step("float32", _method("to_jax"), _jax_from_dlpack),
    "to TensorFlow": _Step("float32", _method("to_tensorflow"), _tensorflow_from_dlpack),
}


def _check(result: Any) -> None:
    """Raise AssertionError unless the result is a capsule or an array of the right length."""
    assert type(result).__name__ == "PyCapsule" or result.shape == (_LENGTH,), f"{result!r} came out"


_CONTENDERS = [Contender("gpuconst.Array", _array, ours=True), Contender("np.ndarray", _ndarray)]


def rows(quick: bool) -> list[Row]:
    """Return a row for each way to hand an array over."""
    return [Row(step, _CONTENDERS, {"step": step}) for step in _STEPS]


CASE = Case("Export and hand-over", rows, check=_check)
