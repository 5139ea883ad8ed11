"""The machine of a run: hardware, versions, and how busy it was otherwise."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "numpy", "ml_dtypes", "torch", "jax", "tensorflow", "tensorflow-cpu", "keras", "numba-cuda", "cuda-core",
    "cupy-cuda12x", "cupy-cuda13x",
)  # fmt: skip
_PROBE = "import gpuconst, json; print(json.dumps(gpuconst.info().asdict()))"


def info(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the result of `gpuconst.info` in a process with the given environment."""
    command = [sys.executable, "-P", "-c", _PROBE]
    done = subprocess.run(command, env=dict(environment), check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def describe(found: Mapping[str, Any], gpu: bool) -> str:
    """Return one line about the hardware and the system.

    Parameters
    ----------
    found : mapping
        From `info`.
    gpu : bool
        Whether the run measures GPUs.
    """
    if gpu:
        return f"{'; '.join(found['devices'])}; driver for CUDA {found['driver']}; {_processor()}; {platform.system()}"
    parts = [_processor(), f"{_memory() / 2**30:.0f} GiB", f"{platform.system()} {platform.release()}"]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists():
        parts.append(f"transparent huge pages: {pages.read_text().split('[')[1].split(']')[0]}")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the compared packages that are installed."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def busy(seconds: float) -> float:
    """Return the share of the machine's cores that others used while this process waited; 0 if unknown."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None or after[1] == before[1]:
        return 0.0
    return round(1 - (after[0] - before[0]) / (after[1] - before[1]), 2)


def _ticks() -> tuple[int, int] | None:
    """Return the idle ticks and the total ticks of all cores since the machine started."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    fields = [int(field) for field in path.read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
