"""Pages of memory: having free ones at hand, and counting those in use."""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contest import MissingError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def touch_and_free(nbytes: int) -> None:
    """Touch twice as many bytes and free them again.

    The free pages of a virtual machine go back to its host after a while, and the next touch of such a page
    takes up to 30 times as long, at the expense of the first contender. Twice, because the system does not
    hand out the last freed pages first: with just as many bytes, some came from elsewhere in every fourth run.
    """
    nbytes *= 2
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    block[:: mmap.PAGESIZE] = bytes(-(-nbytes // mmap.PAGESIZE))
    block.close()


def peak(run: Callable[[], Any]) -> tuple[Any, int]:
    """Return a function's result, and by how many bytes the memory of the process grew at most while it ran.

    Raises
    ------
    MissingError
        If the system does not report it.
    """
    if not _CLEAR.exists():
        raise MissingError("the system does not tell the peak of a process' memory")
    _CLEAR.write_text(_RESET_PEAK)
    before = _bytes("VmRSS")
    result = run()
    return result, _bytes("VmHWM") - before


def _bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
