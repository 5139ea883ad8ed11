"""Fills of more host memory than caches hold, by machine code that stores past them."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from many import noise

import gpuconst
from gpuconst.kernels import host, host_fill, host_streaming

LINE = host_streaming.LINE
GUARD = 2 * LINE
ELEMENT = bytes(range(1, 17))

needs_streaming = pytest.mark.skipif(
    host_streaming.streaming_store() is None, reason="not x86-64 Linux, or the system allows no new code"
)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The address and bytes of everything that is stored past the caches."""
    seen: list[tuple[int, int]] = []
    store = host_streaming.streaming_store()
    assert store is not None

    def watched(address: int, low: int, high: int, lines: int) -> None:
        seen.append((address, lines * LINE))
        store(address, low, high, lines)

    monkeypatch.setattr(host_fill, "streaming_store", lambda: watched)
    return seen


@needs_streaming
@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("objcopy")), reason="needs cc and objcopy")
def test_the_machine_code_is_what_the_assembler_makes_of_its_text(tmp_path: Path) -> None:
    lines = [".intel_syntax noprefix", *(text for _, text in host_streaming.INSTRUCTIONS), ""]
    source, made, code = tmp_path / "store.s", tmp_path / "store.o", tmp_path / "store.bin"
    source.write_text("\n".join(lines))
    subprocess.run(["cc", "-c", source, "-o", made], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", made, code], check=True)
    assert code.read_bytes() == bytes.fromhex("".join(code for code, _ in host_streaming.INSTRUCTIONS))


@pytest.mark.parametrize("available", [pytest.param(True, marks=needs_streaming), False])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_every_byte_of_a_stretch_and_none_beside_it(
    itemsize: int, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not available:
        monkeypatch.setattr(host_fill, "streaming_store", lambda: None)
    element = ELEMENT[:itemsize]
    for offset in range(LINE + 1):
        for nbytes in [itemsize, LINE, 2 * LINE - itemsize, 2 * LINE, 5 * LINE + 48]:
            memory = noise(nbytes + offset + 2 * GUARD)
            expected = memory.copy()
            start = GUARD - memory.ctypes.data % LINE + offset
            expected[start : start + nbytes] = np.frombuffer(element * (nbytes // itemsize), np.uint8)
            host_fill._stream(memory.ctypes.data + start, nbytes, element)
            assert np.array_equal(memory, expected), f"{nbytes} bytes at {offset}"


@needs_streaming
@pytest.mark.parametrize(
    ("dtype", "offset", "streams"),
    [
        ("uint8", 3, True),
        ("bfloat16", 2, True),
        ("float32", 4, True),
        ("complex128", 16, True),
        ("complex128", 8, False),
    ],
)
def test_a_large_fill_goes_past_the_caches(
    dtype: str, offset: int, streams: bool, streamed: list[tuple[int, int]]
) -> None:
    itemsize = gpuconst.full(0, 0, dtype=dtype).itemsize
    memory = np.ones(host_fill.BY_STREAMING + 2 * LINE, np.uint8)
    start = -memory.ctypes.data % LINE + offset
    target = memory[start : start + host_fill.BY_STREAMING]
    gpuconst.fill(target.view(gpuconst.full(0, 0, dtype=dtype).dtype), ELEMENT[:itemsize])
    assert (target.reshape(-1, itemsize) == np.frombuffer(ELEMENT[:itemsize], np.uint8)).all()
    assert (memory[:start] == 1).all()
    assert (memory[start + target.size :] == 1).all()
    pieces = target.nbytes // host_fill.PIECE
    assert sum(nbytes for _, nbytes in streamed) == (target.nbytes - pieces * LINE if streams else 0)


@needs_streaming
def test_a_smaller_fill_stays_in_the_caches(streamed: list[tuple[int, int]]) -> None:
    gpuconst.fill(np.ones(host_fill.BY_STREAMING // 4 - 1, np.float32), 2.0)
    assert not streamed


@needs_streaming
def test_new_memory_is_filled_in_the_caches(streamed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    x = gpuconst.full(host_fill.BY_STREAMING, 3, dtype="uint8", device="cpu")
    memory = mmap.mmap(-1, host_fill.BY_STREAMING + mmap.PAGESIZE)
    y = np.ndarray(host_fill.BY_STREAMING, np.uint8, memory, 16)  # its pieces begin in pages that others end in
    with monkeypatch.context() as patch:
        patch.setattr(host_fill, "share", lambda tasks: [task() for task in tasks])
        gpuconst.fill(y, 4)
    assert not streamed
    assert (x.to_numpy() == 3).all()
    assert (y == 4).all()
    gpuconst.fill(y, 5)
    pieces = y.nbytes // host_fill.PIECE
    assert sum(nbytes for _, nbytes in streamed) == y.nbytes - pieces * LINE
    assert (y == 5).all()


@needs_streaming
def test_many_arrays_go_past_the_caches_if_they_are_large_together(
    streamed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "BY_STREAMING", 3 * host_fill.SMALLEST_SHARED)
    arrays = [np.ones(host_fill.SMALLEST_SHARED // 4, np.float32) for _ in range(3)]
    gpuconst.fill_many(arrays[:2], 2.0)
    assert not streamed
    gpuconst.plan_fill(arrays, [3.0, 4.0, 5.0]).fill()
    assert len(streamed) == 3
    assert [set(array.tolist()) for array in arrays] == [{3.0}, {4.0}, {5.0}]


@needs_streaming
def test_a_page_counts_as_touched_once_it_is_written() -> None:
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = np.frombuffer(memory, np.uint8).ctypes.data
    assert not host_streaming.is_touched(start + mmap.PAGESIZE + 5)
    memory[mmap.PAGESIZE] = 1
    assert host_streaming.is_touched(start + mmap.PAGESIZE + 5)
    assert not host_streaming.is_touched(start + 2 * mmap.PAGESIZE)


@needs_streaming
@pytest.mark.parametrize("system", ["forbids memory files", "has no memory files", "forbids to execute them"])
def test_a_system_that_allows_no_new_code(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*arguments: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    files = set(os.listdir("/proc/self/fd"))
    make: Callable[[], Any] = host_streaming.streaming_store.__wrapped__
    if system == "forbids memory files":
        monkeypatch.setattr(os, "memfd_create", forbid)
    elif system == "has no memory files":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(mmap, "mmap", forbid)
    assert make() is None
    assert set(os.listdir("/proc/self/fd")) == files


@needs_streaming
def test_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    named = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*named[:4], "aarch64")))
    assert host_streaming.streaming_store.__wrapped__() is None
