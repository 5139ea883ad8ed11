"""Which of the packages that tests need are there, and work."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from typing import Any

import pytest

_COMPILE = "from numba import cuda; cuda.compile(lambda: None, 'void()', cc=(9, 0))"


@functools.cache
def why_not(package: str) -> str | None:
    """Return why a package cannot be used here, or None if it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if package == "numba_cuda":  # releases of it and of NumPy that do not go together install side by side
        done = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True)
        if done.returncode:
            return f"numba-cuda does not work here: {done.stderr.splitlines()[-1]}"
    return None


def each(*packages: str) -> list[Any]:
    """Return parameters for a test of several packages, those that cannot be used to be skipped."""
    return [pytest.param(package, marks=pytest.mark.needs(package)) for package in packages]


def require(package: str) -> None:
    """Skip the test where a package cannot be used."""
    reason = why_not(package)
    if reason is not None:
        pytest.skip(reason)
