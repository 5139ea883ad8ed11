"""Fill device memory with a constant, and hand it to any framework without a copy."""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING

if _find_spec("gpuconst.kernels") is None:
    raise ImportError(
        "gpuconst is not installed: this is its source folder; from the repository, run: pip install -e ."
    )

from .array import Array
from .creation import full, full_many, ones, zeros
from .errors import CopyNeededError, DeviceUnavailableError, OutOfMemoryError
from .filling import FillPlan, fill, fill_many, plan_fill
from .views import shares_memory

# Names that need a framework are left out, so that `from gpuconst import *` requires none.
__all__ = [
    "Array",
    "CopyNeededError",
    "DeviceUnavailableError",
    "FillPlan",
    "Info",
    "OutOfMemoryError",
    "fill",
    "fill_many",
    "full",
    "full_many",
    "info",
    "ones",
    "plan_fill",
    "shares_memory",
    "zeros",
]

if TYPE_CHECKING:
    from . import jax as jax
    from . import keras as keras
    from . import torch as torch
    from .environment import Info, info
    from .keras import Constant as Constant
    from .keras import Ones as Ones
    from .keras import Zeros as Zeros

    __version__: str
else:
    _ADAPTERS = ["jax", "keras", "torch"]
    _LAZY = {"Constant": "keras", "Info": "environment", "Ones": "keras", "Zeros": "keras", "info": "environment"}

    def __getattr__(name):
        """Import on first access what not every program needs; an adapter imports its framework."""
        if name in _ADAPTERS:
            return _import_module(f"gpuconst.{name}")
        if name in _LAZY:
            return getattr(_import_module(f"gpuconst.{_LAZY[name]}"), name)
        if name == "__version__":
            return _import_module("importlib.metadata").version("gpuconst")
        raise AttributeError(f"module 'gpuconst' has no attribute {name!r}")

    def __dir__():
        adapters = [name for name in _ADAPTERS if _find_spec(name) is not None]
        lazy = [name for name, module in _LAZY.items() if module in adapters]
        dunders = [name for name in globals() if name.startswith("__")]
        return sorted({*__all__, *adapters, *lazy, *dunders, "__version__"})
