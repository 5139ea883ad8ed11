"""The cost that each process pays once: the import, and the first call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from benchmarks.contest import Case, Contender, Row

# -P: imports from the tree that is measured, not from the working directory.
_COMMAND = [sys.executable, "-P", "-c"]
_TIMED = "import time; {before}\nstart = time.perf_counter()\n{timed}\nprint(time.perf_counter() - start)"


def _environment() -> dict[str, str]:
    """Return the environment, with caching of compiled modules allowed, as for an installed package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _contender(name: str, imports: str, call: str, ours: bool = False) -> Contender:
    """Return a contender that measures in an interpreter of its own, with nothing else imported."""

    def make(step: str) -> Callable[[], float]:
        before, timed = ("", imports) if step == "import" else (imports, call)
        code = _TIMED.format(before=before, timed=timed)

        def measure() -> float:
            done = subprocess.run([*_COMMAND, code], check=True, stdout=subprocess.PIPE, text=True, env=_environment())
            return float(done.stdout)

        return measure

    return Contender(name, make, ours)


_CONTENDERS = [
    _contender("gpuconst", "import gpuconst", "gpuconst.full(1000, 1.1, device='cpu')", ours=True),
    _contender("NumPy and ml_dtypes", "import numpy, ml_dtypes", "numpy.full(1000, 1.1, numpy.float32)"),
    _contender("torch", "import torch", "torch.full((1000,), 1.1)"),
    _contender("JAX", "import jax.numpy as jnp", "jnp.full(1000, 1.1).block_until_ready()"),
]
#: Without the others, whose import takes a second or more.
_QUICK_CONTENDERS = _CONTENDERS[:2]


def rows(quick: bool) -> list[Row]:
    """Return a row for the import, and one for the first array after it."""
    contenders = _QUICK_CONTENDERS if quick else _CONTENDERS
    return [Row(step, contenders, {"step": step}) for step in ("import", "first array")]


CASE = Case("Start of a process", rows, rounds=5)
