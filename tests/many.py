"""Any arrays in one piece of memory, and what filling one after the other leaves there."""

from __future__ import annotations

import array
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from gpuconst.dtypes import DTYPES

GUARD = 64
_LONGEST = 6**3 * 16  # bytes that an entry spans at most


class Entry(NamedTuple):
    """An array somewhere in memory, and the value to fill it with."""

    library: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    value: Any

    def over(self, memory: np.ndarray) -> Any:
        """Return the array."""
        itemsize = DTYPES[self.dtype].itemsize
        if self.library == "torch":
            rest = memory[self.start :]
            elements = torch.from_numpy(rest[: len(rest) // itemsize * itemsize]).view(getattr(torch, self.dtype))
            return elements.as_strided(self.shape, [stride // itemsize for stride in self.strides])
        array = np.ndarray(self.shape, DTYPES[self.dtype].numpy, memory.data, self.start, self.strides)
        return array if self.library == "numpy" else array.data

    def write(self, memory: np.ndarray) -> None:
        """Fill it as NumPy does."""
        element = element_of(self.value, self.dtype)
        bits = f"V{len(element)}"
        np.ndarray(self.shape, bits, memory.data, self.start, self.strides)[...] = np.frombuffer(element, bits)[0]


def element_of(value: Any, dtype: str) -> bytes:
    """Return the bytes of an element with a value that the dtype holds."""
    return value if isinstance(value, bytes) else np.asarray(value).astype(DTYPES[dtype].numpy).tobytes()


def noise(nbytes: int) -> np.ndarray:
    """Return bytes of which none is like its neighbours."""
    return (np.arange(nbytes) * 37 % 251).astype(np.uint8)


class FreshBuffer:
    """Describes a buffer of its own each time it is asked, which nobody else holds."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Any]] = []

    @property
    def __array_interface__(self) -> dict[str, Any]:
        buffer = array.array("B", bytes(4096))
        self.made.append(weakref.ref(buffer))
        return {"version": 3, "shape": (4096,), "typestr": "|u1", "data": buffer}


def filled(size: int, entries: Sequence[Entry]) -> np.ndarray:
    """Return `noise` with the entries filled one after the other."""
    memory = noise(size)
    for entry in entries:
        entry.write(memory)
    return memory


@st.composite
def _entries(draw: st.DrawFn, size: int) -> Entry:
    library = draw(st.sampled_from(["torch", "torch", "numpy", "memoryview"]))
    known = [
        name
        for name, row in DTYPES.items()
        if library == "numpy" or (hasattr(torch, name) if library == "torch" else row.native)
    ]
    dtype = draw(st.sampled_from(known))
    itemsize = DTYPES[dtype].itemsize
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    if draw(st.booleans()):
        strides = np.ndarray(shape, f"V{itemsize}").strides
    elif library == "torch":
        strides = tuple(itemsize * draw(st.integers(0, 32 // itemsize)) for _ in shape)
    else:
        strides = tuple(draw(st.integers(-40, 40)) for _ in shape)
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)] if 0 not in shape else []
    low, high = -sum(step for step in steps if step < 0), sum(step for step in steps if step > 0) + itemsize
    start = draw(st.integers(GUARD + low, size - GUARD - high))
    value = draw(st.sampled_from([True, 1, 1.0, np.float32(1)]) | st.binary(min_size=itemsize, max_size=itemsize))
    return Entry(library, dtype, shape, strides, start, value)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[Entry]]:
    """Return a size of memory and entries in it: crowded or far apart, some of them more than once."""
    size = draw(st.sampled_from([2 * GUARD + 2 * _LONGEST, 1 << 15]))
    entries = draw(st.lists(_entries(size), max_size=12))
    again = draw(st.lists(st.sampled_from(entries), max_size=3)) if entries else []
    return size, entries + again
