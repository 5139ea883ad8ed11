"""New memory, filled: `full`, `zeros`, `ones`, and `full_many` for many arrays at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import accumulate, repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .array import Array
from .backends import Place, select
from .batch import tiles
from .dtypes import DType, resolve_dtype
from .errors import about, brief
from .kernels.cuda_driver import on_any_thread
from .kernels.host_fill import fill_stretch
from .kernels.host_memory import ALIGNMENT
from .kernels.runs import RUN
from .log import debug
from .streams import stream_handle
from .values import check_shape, default_dtype, encode

__all__ = ["full", "full_many", "ones", "zeros"]


#: Up to this many new arrays are filled one by one on the CPU.
FEW = 200

T = TypeVar("T")


def full(shape: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, stream: Any = None) -> Array:
    """Return a new array filled with a constant.

    The shape and value are checked, and the value encoded, on the host before anything is allocated.

    Parameters
    ----------
    shape : int or sequence of int
        Elements along each dimension.
    fill_value : scalar or bytes
        A Python or NumPy scalar, a 0-d NumPy array, or ``bytes``: the raw bits of one element.
    dtype : optional
        A name, a NumPy or ml_dtypes dtype, or the dtype object of a framework. By default, bool gives
        bool, int gives int64, float gives float32 and complex gives complex64.
    device : str, optional
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. By default, a usable GPU if there is one, otherwise the
        CPU; `Array.device` says which was chosen, and `info` says why.
    stream : optional
        The CUDA stream to fill on: an int handle, a stream of CuPy, torch, Numba or cuda.core, or
        anything with ``__cuda_stream__``. By default, the legacy default stream.

    Returns
    -------
    Array
        C-ordered, and aligned to 256 bytes.

    Raises
    ------
    TypeError
        If the shape is not an int or a sequence of ints, the dtype is unknown, or the value is not a
        number or is of the wrong kind for the dtype (a fraction for an int, complex for a real).
    ValueError
        If a dimension is negative, `device` is not a device name, ``bytes`` are not one element long,
        or a stream is given for the CPU.
    OverflowError
        If the value does not fit the dtype, or the array would have more than ``2**63 - 1`` bytes.
    DeviceUnavailableError
        If the requested device cannot be used.
    OutOfMemoryError
        If the device has no memory left.
    RuntimeError
        If a CUDA graph is being captured: nothing can be allocated meanwhile.

    Examples
    --------
    >>> import gpuconst
    >>> gpuconst.full((2, 3), 0.1, dtype="bfloat16", device="cpu").to_numpy()
    array([[0.100098, 0.100098, 0.100098],
           [0.100098, 0.100098, 0.100098]], dtype=bfloat16)
    """
    row = default_dtype(fill_value) if dtype is None else resolve_dtype(dtype)
    dims, nbytes = check_shape(shape, row.itemsize)
    element = encode(fill_value, row)
    place = select(device)
    handle = 0 if stream is None and place.device == "cpu" else stream_handle(stream, place)
    memory, address = place.module.full(nbytes, element, place.index, handle)
    return Array(memory, address, dims, row, place, handle and on_any_thread(handle))


# TensorFlow's AutoGraph rewrites whatever a `tf.function` calls, apart from functions that have this attribute.
full.autograph_info__ = {}  # type: ignore[attr-defined]


def zeros(shape: Any, *, dtype: Any = "float32", device: Any = None, stream: Any = None) -> Array:
    """Return a new array of zeros: `full` with 0.0, float32 by default.

    Parameters
    ----------
    shape : int or sequence of int
        Elements along each dimension.
    dtype, device, stream : optional
        As for `full`.

    Returns
    -------
    Array

    Raises
    ------
    OverflowError
        If the dtype has no zero (float8_e8m0fnu); otherwise as for `full`.
    """
    return full(shape, 0.0, dtype=dtype, device=device, stream=stream)


def ones(shape: Any, *, dtype: Any = "float32", device: Any = None, stream: Any = None) -> Array:
    """Return a new array of ones: `full` with 1.0, float32 by default.

    Parameters
    ----------
    shape : int or sequence of int
        Elements along each dimension.
    dtype, device, stream : optional
        As for `full`.

    Returns
    -------
    Array
    """
    return full(shape, 1.0, dtype=dtype, device=device, stream=stream)


def full_many(specs: Mapping[str, tuple[Any, Any, Any]], *, device: Any = None, stream: Any = None) -> dict[str, Array]:
    """Return many new arrays, each filled with its own constant, from one allocation and one launch.

    Parameters
    ----------
    specs : mapping of str to (shape, fill_value, dtype)
        For each name, the arguments of `full`; a dtype of None means the default for the value.
    device, stream : optional
        As for `full`.

    Returns
    -------
    dict of str to Array
        The arrays, in the order of `specs`, each aligned to 256 bytes. They share one block of memory,
        which lives as long as any of them, or anything else that shares it.

    Raises
    ------
    TypeError, ValueError, OverflowError
        As for `full`, with the name in the message, before anything is allocated; also TypeError if a
        spec is not a triple.
    DeviceUnavailableError
        If the requested device cannot be used.
    OutOfMemoryError
        If the device has no memory left.
    RuntimeError
        If a CUDA graph is being captured: nothing can be allocated meanwhile.

    Examples
    --------
    >>> import gpuconst
    >>> made = gpuconst.full_many({"scale": (3, 1.0, "float32"), "bias": ((2, 2), 0, "bfloat16")}, device="cpu")
    >>> made["scale"].to_numpy()
    array([1., 1., 1.], dtype=float32)
    """
    start = time.perf_counter()
    if not isinstance(specs, Mapping):
        raise TypeError(f"specs is {type(specs).__name__}, expected a mapping of name to (shape, fill_value, dtype)")
    names = list(specs)
    shapes, values, dtypes = _columns(specs)
    rows = _resolved(names, dtypes, values)
    place = select(device)
    handle = stream_handle(stream, place)
    if place.device == "cpu" and len(names) <= FEW:
        filled, launches = _filled_in_turn(names, shapes, values, rows, place), len(names)
    else:
        filled, launches = _filled_at_once(names, shapes, values, rows, place, handle), 1
    used_on = repeat(on_any_thread(handle))
    arrays = map(Array, repeat(filled.memory), filled.addresses, filled.shapes, rows, repeat(place), used_on)
    made: dict[str, Any] = dict(specs)  # already full size, where a new dict would grow step by step
    made.update(zip(names, arrays, strict=True))
    seconds = time.perf_counter() - start
    debug("filled %d arrays, %d bytes, in %d launches; took %.6f s", len(made), filled.nbytes, launches, seconds)
    return made


class _Filled(NamedTuple):
    """Memory that holds many arrays: its owner, the address and shape of each array, and their total bytes."""

    memory: Any
    addresses: Sequence[int]
    shapes: Sequence[tuple[int, ...]]
    nbytes: int


def _filled_in_turn(
    names: Sequence[str], shapes: Sequence[Any], values: Sequence[Any], rows: Sequence[DType], place: Place
) -> _Filled:
    """Fill a few arrays on the CPU, which `_filled_at_once` would take longer to lay out than to fill."""
    measured = _each(names, check_shape, shapes, [row.itemsize for row in rows])
    elements = _each(names, encode, values, rows)
    offsets = [0, *accumulate(nbytes + -nbytes % ALIGNMENT for _, nbytes in measured)]
    _check_total(offsets[-1])
    memory, address = place.module.allocate(offsets[-1], place.index, 0)
    addresses = [address + offset for offset in offsets[:-1]]
    for start, (_, nbytes), element in zip(addresses, measured, elements, strict=True):
        fill_stretch(start, nbytes, element)
    return _Filled(memory, addresses, [dims for dims, _ in measured], sum(nbytes for _, nbytes in measured))


def _check_total(nbytes: int) -> None:
    if nbytes >= 2**63:
        raise OverflowError(f"the arrays take {nbytes} bytes together, more than 2**63 - 1; make them in parts")


def _filled_at_once(
    names: Sequence[str], shapes: Sequence[Any], values: Sequence[Any], rows: Sequence[DType], place: Place, handle: int
) -> _Filled:
    """Fill many arrays in one launch."""
    shapes, nbytes = _measured(names, shapes, rows)
    words = tiles(values, rows, lambda index: repr(names[index]))
    padded = nbytes + -nbytes % np.uint64(ALIGNMENT)
    total = sum(padded.tolist())
    _check_total(total)
    memory, address = place.module.allocate(total, place.index, handle)

    offsets = np.cumsum(padded) - padded
    # Neighbours with the same tile form one run, including the padding between them.
    first = np.flatnonzero(np.append(True, (words[1:] != words[:-1]).any(axis=1)))[: len(names)]
    runs = np.zeros(len(first), RUN)
    runs["address"], runs["count"] = offsets[first] + np.uint64(address), 1
    runs["nbytes"] = np.diff(offsets[first], append=np.uint64(total))
    runs["tile_low"], runs["tile_high"] = words[first, 0], words[first, 1]
    place.module.prepare(runs[runs["nbytes"] > 0], [], place.index, handle)(handle)
    return _Filled(memory, (offsets + np.uint64(address)).tolist(), shapes, int(nbytes.sum()))


def _columns(specs: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Return the shapes, values and dtypes of specs, in their order."""
    triples = list(specs.values())
    if not set(map(type, triples)) <= {tuple} or not set(map(len, triples)) <= {3}:
        triples = list(map(_triple, specs.items()))
    shapes, values, dtypes = (list(map(itemgetter(place), triples)) for place in range(3))
    return shapes, values, dtypes


def _triple(entry: tuple[str, Any]) -> tuple[Any, Any, Any]:
    name, spec = entry
    if not isinstance(spec, str | bytes | Mapping | Set) and not hasattr(spec, "__array__"):
        with contextlib.suppress(TypeError, ValueError):
            shape, value, dtype = spec
            return shape, value, dtype
    raise TypeError(f"{name!r} has the spec {brief(spec)}, expected (shape, fill_value, dtype)")


def _resolved(names: Sequence[str], dtypes: Sequence[Any], values: Sequence[Any]) -> list[DType]:
    """Return the row of each dtype; for None, the default for the value."""
    # By identity: thousands of dtypes are few distinct objects, and some distinct ones compare equal.
    keys = list(map(id, dtypes))
    known = dict(zip(keys, dtypes, strict=True))
    if id(None) in known:
        return _each(
            names, lambda dtype, value: default_dtype(value) if dtype is None else resolve_dtype(dtype), dtypes, values
        )
    try:
        rows = {key: resolve_dtype(dtype) for key, dtype in known.items()}
    except TypeError:
        return _each(names, resolve_dtype, dtypes)
    return [*rows.values()] * len(keys) if len(rows) == 1 else list(map(rows.__getitem__, keys))


def _measured(
    names: Sequence[str], shapes: Sequence[Any], rows: Sequence[DType]
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Return each shape as a tuple of ints, and the bytes that it takes."""
    itemsizes = list(map(attrgetter("itemsize"), rows))
    if set(map(type, shapes)) == {int}:
        with contextlib.suppress(OverflowError):  # negative, or too large to count
            lengths = np.fromiter(shapes, np.uint64, len(shapes))
            if lengths.max() < 2**58:  # elements have 16 bytes at most
                return list(zip(shapes, strict=True)), lengths * np.fromiter(itemsizes, np.uint64, len(rows))
    measured = _each(names, check_shape, shapes, itemsizes)
    return [dims for dims, _ in measured], np.fromiter(map(itemgetter(1), measured), np.uint64, len(measured))


def _each(names: Iterable[str], function: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
    """Return the results of a function for each row; if it raises, the message names the row."""
    try:
        return list(map(function, *columns))
    except (TypeError, ValueError, OverflowError):
        for name, arguments in zip(names, zip(*columns, strict=True), strict=True):
            try:
                function(*arguments)
            except (TypeError, ValueError, OverflowError) as error:
                raise about(error, repr(name)) from None
        raise
