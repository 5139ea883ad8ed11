"""Facts about many arrays at once, one library at a time: a look at each would cost more than filling it."""

from __future__ import annotations

import ctypes
import itertools
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .array import Array
from .torch_rules import are_plain, tensor_positions

__all__ = ["Columns", "columns"]


class Columns(NamedTuple):
    """Facts about many arrays, one column per fact.

    Attributes
    ----------
    plain : numpy.ndarray of bool
        Which arrays are dense, contiguous, on the CPU or CUDA, and may be written; the other columns hold
        for these only.
    addresses, nbytes, devices : numpy.ndarray of int
        The address, the bytes and the device of each: -1 for the CPU, else the index of the GPU.
    dtypes : list
        The dtype of each, as an object of its own library.
    """

    plain: np.ndarray
    addresses: np.ndarray
    nbytes: np.ndarray
    devices: np.ndarray
    dtypes: list[Any]


def columns(arrays: Sequence[Any]) -> Iterator[tuple[Sequence[int], Columns]]:
    """Read the torch tensors, the NumPy arrays and the gpuconst arrays among some arrays, and find what a look would.

    Subclasses of NumPy's and gpuconst's arrays are left out.

    Parameters
    ----------
    arrays : sequence of array
        Of any libraries.

    Yields
    ------
    positions : sequence of int
        Indices of the arrays of one library.
    found : Columns
        The facts about these.
    """
    tensors = tensor_positions(arrays)
    if tensors:
        yield tensors, _tensor_columns(_chosen(arrays, tensors))
    if len(tensors) < len(arrays):
        kinds = list(map(type, arrays))
        for kind, read in _READERS.items():
            positions = [position for position, its in enumerate(kinds) if its is kind]
            if positions:
                yield positions, read(_chosen(arrays, positions))


def _chosen(arrays: Sequence[Any], positions: Sequence[int]) -> Sequence[Any]:
    return arrays if len(positions) == len(arrays) else [arrays[position] for position in positions]


def _numpy_columns(arrays: Sequence[np.ndarray]) -> Columns:
    addresses = np.fromiter(map(_buffer_address, arrays), np.uint64, len(arrays))
    nbytes = np.fromiter(map(operator.attrgetter("nbytes"), arrays), np.uint64, len(arrays))
    dtypes = list(map(operator.attrgetter("dtype"), arrays))
    itemsizes = np.fromiter(map(operator.attrgetter("itemsize"), arrays), np.uint64, len(arrays))
    plain = (addresses != 0) & (addresses % np.maximum(itemsizes, 1) == 0)
    return Columns(plain, addresses, nbytes, np.full(len(arrays), -1), dtypes)


def _buffer_address(array: np.ndarray) -> int:
    """Return the address of a writable, contiguous array, 0 for any other; takes a third of NumPy's own time."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):  # from ctypes, for gaps and for read-only, empty and ml_dtypes arrays
        return 0


def _array_columns(arrays: Sequence[Array]) -> Columns:
    nbytes = np.fromiter([x.nbytes for x in arrays], np.uint64, len(arrays))
    return Columns(
        nbytes > 0,
        np.fromiter([x.data_ptr() for x in arrays], np.uint64, len(arrays)),
        nbytes,
        np.fromiter([-1 if x.device == "cpu" else x.__dlpack_device__()[1] for x in arrays], np.int64, len(arrays)),
        [x.dtype for x in arrays],
    )


_READERS: dict[type, Callable[[Sequence[Any]], Columns]] = {np.ndarray: _numpy_columns, Array: _array_columns}

#: Tensors to read at a time: as many as the cache holds.
_AT_A_TIME = 512


def _tensor_columns(tensors: Sequence[Any]) -> Columns:
    chunks = [_read_tensors(tensors[start : start + _AT_A_TIME]) for start in range(0, len(tensors), _AT_A_TIME)]
    if len(chunks) == 1:
        return chunks[0]
    plain, addresses, nbytes, devices, dtypes = zip(*chunks, strict=True)
    return Columns(
        np.concatenate(plain),
        np.concatenate(addresses),
        np.concatenate(nbytes),
        np.concatenate(devices),
        list(itertools.chain.from_iterable(dtypes)),
    )


def _read_tensors(tensors: Sequence[Any]) -> Columns:
    """Read one fact of all tensors before the next, in C: a call of our own for each would take several times as long.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        At least one, of any kind.
    """
    torch = sys.modules["torch"]

    count, tensor_type = len(tensors), torch.Tensor
    is_cpu, is_cuda = operator.attrgetter("is_cpu"), operator.attrgetter("is_cuda")

    def read(fact: Callable[[Any], Any], dtype: Any = np.bool_) -> np.ndarray:
        return np.fromiter(map(fact, tensors), dtype, count)

    def true(fact: Callable[[Any], bool]) -> np.ndarray | bool:
        return all(map(fact, tensors)) or read(fact)  # for most facts, all tensors agree

    def false(fact: Callable[[Any], bool]) -> np.ndarray | bool:
        return not any(map(fact, tensors)) or ~read(fact)

    ordinary = are_plain(tensors) and torch.autograd.forward_ad._current_level < 0
    if ordinary:
        try:
            addresses = read(tensor_type.data_ptr, np.uint64)
        except RuntimeError:  # a sparse or transformed tensor has no memory of its own
            ordinary = False
    if not ordinary:
        unknown = np.zeros(count, np.uint64)
        return Columns(np.zeros(count, np.bool_), unknown, unknown, np.full(count, -1), [None] * count)
    nbytes = read(operator.attrgetter("nbytes"), np.uint64)
    dtypes = list(map(operator.attrgetter("dtype"), tensors))
    itemsizes = {dtype: dtype.itemsize for dtype in set(dtypes)}
    steps = (
        np.fromiter(map(itemsizes.__getitem__, dtypes), np.uint64, count)
        if len(itemsizes) > 1
        else [*itemsizes.values()]
    )
    itemsize = np.array(steps, np.uint64)
    plain = (addresses != 0) & (addresses % itemsize == 0)
    stored = np.fromiter(map(torch.UntypedStorage.nbytes, map(tensor_type.untyped_storage, tensors)), np.uint64, count)
    plain &= read(tensor_type.storage_offset, np.uint64) * itemsize + nbytes <= stored
    plain &= true(tensor_type.is_contiguous)
    plain &= false(tensor_type.is_neg)
    if any(dtype.is_complex for dtype in itemsizes):
        plain &= false(tensor_type.is_conj)
    devices = np.full(count, -1)
    if not all(map(is_cpu, tensors)):
        devices = read(tensor_type.get_device, np.int64)
        if not all(map(is_cuda, tensors)):
            plain &= read(is_cpu) | read(is_cuda)
    if not torch.is_inference_mode_enabled():
        plain &= false(tensor_type.is_inference)
    if torch.is_grad_enabled():
        plain &= false(operator.attrgetter("requires_grad"))
    return Columns(plain, addresses, nbytes, devices, dtypes)
