"""A fill whose stores bypass the caches, for more memory than these hold.

A processor reads what it is about to overwrite into its cache first, unless it is told not to: memory that no
cache holds would be moved twice. The C library has no fill of words with such stores, so here is one, in the machine
code of x86-64: ``store(address, low, high, lines)`` puts a tile in every 16 bytes of that many cache lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable

import numpy as np

__all__ = ["LINE", "is_touched", "streaming_store"]

#: A cache line, in bytes. Half a line is stored as slowly as two.
LINE = 64

#: Machine code and assembler; the arguments arrive in rdi, rsi, rdx and rcx, and 16-byte stores need aligned addresses.
INSTRUCTIONS = [
    ("f3 0f 1e fa", "endbr64"),
    ("66 48 0f 6e c6", "movq xmm0, rsi"),
    ("66 48 0f 6e ca", "movq xmm1, rdx"),
    ("66 0f 6c c1", "punpcklqdq xmm0, xmm1"),
    ("", "again:"),
    ("66 0f e7 07", "movntdq [rdi], xmm0"),
    ("66 0f e7 47 10", "movntdq [rdi + 16], xmm0"),
    ("66 0f e7 47 20", "movntdq [rdi + 32], xmm0"),
    ("66 0f e7 47 30", "movntdq [rdi + 48], xmm0"),
    ("48 83 c7 40", "add rdi, 64"),
    ("48 ff c9", "dec rcx"),
    ("75 e4", "jnz again"),
    ("0f ae f8", "sfence"),  # or another thread could still see the old bytes
    ("c3", "ret"),
]


@functools.cache
def streaming_store() -> Callable[[int, int, int, int], None] | None:
    """Return the function above, or None where the processor or the system is another, or allows no new code.

    The address must be a multiple of `LINE`, and the lines at least one.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64" or sys.maxsize < 2**32:
        return None
    code = bytes.fromhex("".join(code for code, _ in INSTRUCTIONS))
    with contextlib.suppress(AttributeError, OSError):  # systems can forbid memory files, or to execute them
        # Of a file, because what can be written should never be executable, not even for a moment.
        file = os.memfd_create("gpuconst")
        try:
            os.write(file, code)
            page = mmap.mmap(file, len(code), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
        finally:
            os.close(file)
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t)
        store = prototype(np.frombuffer(page, np.uint8).ctypes.data)
        store.page = page  # type: ignore[attr-defined]  # must live as long
        return store
    return None


def is_touched(address: int) -> bool:
    """Whether the page of an address is in memory, and not only promised, as it is before its first touch."""
    found = ctypes.c_ubyte()
    _mincore()(address & -mmap.PAGESIZE, 1, ctypes.byref(found))
    return bool(found.value & 1)


@functools.cache
def _mincore() -> Callable[..., int]:
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    found: Callable[..., int] = mincore
    return found
