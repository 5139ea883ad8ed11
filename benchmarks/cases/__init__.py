"""The cases, one file each, in the order in which they run."""

from __future__ import annotations

import importlib
from typing import cast

from benchmarks.contest import Case

CPU = [
    "first_touch",
    "creation",
    "fill",
    "clear",
    "handover",
    "keras_initializers",
    "jax_first_touch",
    "jax_initializers",
    "torch_modules",
    "many_new",
    "many_existing",
    "growth",
    "startup",
    "memory",
    "keras_memory",
]
GPU = ["gpu_device", "gpu_host", "gpu_end_to_end", "gpu_many"]


def load(name: str) -> Case:
    """Return a case: `CASE` in the module of that name, which imports none of the libraries that it measures."""
    return cast(Case, importlib.import_module(f"benchmarks.cases.{name}").CASE)
