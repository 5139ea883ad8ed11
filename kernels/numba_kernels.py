"""The kernels of the Numba backend, as Python functions; importing this imports Numba.

Numba splits every vector into scalars, so the one store that matters is an intrinsic. The code that builds
the kernels passes it in: a test in the simulator passes one that checks the address instead.
"""

# cuda.threadIdx and the like exist only within a kernel.
# mypy: disable-error-code="attr-defined,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.cuda.extending import intrinsic

from .runs import BLOCK, CHUNK, INNER_LENGTHS, LANES, RUN, THREADS, TILE

_ADDRESS, _NBYTES, _PITCH, _COUNT, _LOW, _HIGH = range(RUN.itemsize // 8)
_WORDS = RUN.itemsize // 8
_UNITS = BLOCK // TILE
_CHUNK_UNITS = CHUNK // TILE

#: Parameter types. Addresses and sizes are signed, as Numba's arithmetic is where one operand is.
_RUN = (types.int64, types.int64, types.uint64, types.uint64)
_ROWS = (*(types.int64,) * 4, types.uint64, types.uint64)
_RUNS = (types.CPointer(types.uint64), types.int64, types.int64)
_STRIDED = (*(types.int64,) * 4, types.uint64, types.uint64, *(types.int64,) * (2 * INNER_LENGTHS + 1))


@intrinsic
def store(typing_context: Any, address: Any, width: Any, low: Any, high: Any) -> Any:
    """Store the first `width` bytes of (low, high) at an address that is a multiple of `width`, a literal."""
    if not isinstance(width, types.IntegerLiteral):
        return None  # Numba asks again, with the literal
    nbytes = width.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, _, low, high = arguments
        if nbytes == TILE:
            pair = ir.VectorType(ir.IntType(64), 2)
            value = ir.Constant(pair, ir.Undefined)
            for position, half in enumerate((low, high)):
                value = builder.insert_element(value, half, ir.Constant(ir.IntType(32), position))
        else:
            value = builder.trunc(low, ir.IntType(8 * nbytes)) if nbytes < 8 else low
        pointer = builder.inttoptr(address, ir.PointerType(value.type, addrspace=1))  # global memory
        builder.store(value, pointer, align=nbytes)
        return context.get_dummy_value()

    return types.void(types.int64, width, types.uint64, types.uint64), generate


def kernels(
    store: Callable[..., None], device: Callable[[Any], Any]
) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    """Build the kernels.

    Parameters
    ----------
    store : callable
        Stores the first ``width`` bytes of (low, high): ``store(address, width, low, high)``.
    device : callable
        Decorator that makes a function callable from a kernel.

    Returns
    -------
    dict of str to (function, tuple of types)
        Kernels and the types of their parameters, by name.
    """
    # In what follows, an int is Numba's: of fixed width, and int64 unless a conversion says otherwise.

    @device
    def word(offset: Any, low: Any, high: Any) -> Any:
        """Return up to eight bytes of a tile, from the one at `offset`."""
        return (high if offset & 8 else low) >> np.uint64((offset & 7) * 8)

    @device
    def store_edges(address: Any, nbytes: Any, head: Any, thread: Any, low: Any, high: Any) -> None:
        """Store the bytes before the first 16-byte boundary and after the last, one for each of 15 threads."""
        tail = (nbytes - head) & 15
        if thread < head:
            store(address + thread, 1, word((address + thread) & 15, low, high), high)
        if thread < tail:
            store(address + nbytes - tail + thread, 1, word(thread, low, high), high)

    @device
    def fill_part(
        address: Any, nbytes: Any, first: Any, count: Any, pace: Any, edges: Any, thread: Any, low: Any, high: Any
    ) -> None:
        """Store a thread's units of 16 bytes in a stretch, and its byte of the edges.

        Every `pace`-th unit from `first` on, of the `count` that its CTA or warp fills, checked against the end
        of the stretch only near it.
        """
        head = min(-address & 15, nbytes)
        units = (nbytes - head) // TILE
        at = address + head + first * TILE
        if first + (count - pace) < units:
            for step in range(0, count, pace):
                store(at + step * TILE, 16, low, high)
        else:
            for step in range(0, count, pace):
                if first + step < units:
                    store(at + step * TILE, 16, low, high)
        if edges:
            store_edges(address, nbytes, head, thread, low, high)

    def fill_run(address: Any, nbytes: Any, low: Any, high: Any) -> None:
        first = cuda.blockIdx.x * _UNITS + cuda.threadIdx.x
        edges = cuda.blockIdx.x == 0 and cuda.threadIdx.x < TILE
        fill_part(address, nbytes, first, _UNITS, THREADS, edges, cuda.threadIdx.x, low, high)

    def fill_rows(address: Any, nbytes: Any, pitch: Any, chunks: Any, low: Any, high: Any) -> None:
        chunk = cuda.blockIdx.x * (THREADS // LANES) + cuda.threadIdx.x // LANES
        if chunk >= chunks:
            return
        stretch = chunk
        local = 0
        if nbytes > CHUNK:
            chunks_per_stretch = (nbytes + (CHUNK - 1)) // CHUNK
            stretch = np.int64(np.uint64(chunk) // np.uint64(chunks_per_stretch))
            local = chunk - stretch * chunks_per_stretch
        lane = cuda.threadIdx.x % LANES
        first = local * _CHUNK_UNITS + lane
        fill_part(address + stretch * pitch, nbytes, first, _CHUNK_UNITS, LANES, local == 0, lane, low, high)

    def fill_runs(table: Any, rows: Any, chunks: Any) -> None:
        chunk = cuda.blockIdx.x * (THREADS // LANES) + cuda.threadIdx.x // LANES
        if chunk >= chunks:
            return
        ends = rows * _WORDS
        row = 0  # the first that ends after the chunk
        end = rows - 1
        while row < end:
            middle = (row + end) // 2
            if np.int64(table[ends + middle]) > chunk:
                end = middle
            else:
                row = middle + 1
        if row:
            chunk -= np.int64(table[ends + row - 1])
        row *= _WORDS
        address = np.int64(table[row + _ADDRESS])
        nbytes = np.int64(table[row + _NBYTES])
        if table[row + _COUNT] > 1:
            chunks_per_stretch = (nbytes + (CHUNK - 1)) // CHUNK
            stretch = np.int64(np.uint64(chunk) // np.uint64(chunks_per_stretch))
            chunk -= stretch * chunks_per_stretch
            address += stretch * np.int64(table[row + _PITCH])
        lane = cuda.threadIdx.x % LANES
        first = chunk * _CHUNK_UNITS + lane
        low, high = table[row + _LOW], table[row + _HIGH]
        fill_part(address, nbytes, first, _CHUNK_UNITS, LANES, chunk == 0, lane, low, high)

    def strided(index_type: Any) -> Any:
        def fill_strided(
            address: Any, total: Any, width: Any, shift: Any, low: Any, high: Any,
            length1: Any, length2: Any, length3: Any, stride0: Any, stride1: Any, stride2: Any, stride3: Any,
        ) -> None:  # fmt: skip
            thread = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
            if thread >= total:
                return
            offset = (thread & ((1 << shift) - 1)) * width
            index = index_type(thread >> shift)
            # Division is what costs here: none is done for dimensions that do not exist.
            if length3 > 1:
                outer = index // index_type(length3)
                address += np.int64(index - outer * index_type(length3)) * stride3
                index = index_type(outer)
            if length2 > 1:
                outer = index // index_type(length2)
                address += np.int64(index - outer * index_type(length2)) * stride2
                index = index_type(outer)
            if length1 > 1:
                outer = index // index_type(length1)
                address += np.int64(index - outer * index_type(length1)) * stride1
                index = index_type(outer)
            address += np.int64(index) * stride0 + offset
            if width == 16:
                store(address, 16, low, high)
            elif width == 8:
                store(address, 8, word(offset, low, high), high)
            elif width == 4:
                store(address, 4, word(offset, low, high), high)
            elif width == 2:
                store(address, 2, word(offset, low, high), high)
            else:
                store(address, 1, word(offset, low, high), high)

        return fill_strided

    return {
        "fill_run": (fill_run, _RUN),
        "fill_rows": (fill_rows, _ROWS),
        "fill_runs": (fill_runs, _RUNS),
        "fill_strided32": (strided(np.uint32), _STRIDED),
        "fill_strided64": (strided(np.uint64), _STRIDED),
    }
