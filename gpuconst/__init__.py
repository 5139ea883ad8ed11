"""Fill device memory with a constant, and hand it to any framework without a copy."""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

if _find_spec("gpuconst.kernels") is None:
    raise ImportError(
        "gpuconst is not installed: this is its source folder; from the repository, run: pip install -e ."
    )

from .array import Array
from .creation import full, full_many, ones, zeros
from .errors import CopyNeededError, DeviceUnavailableError, OutOfMemoryError
from .filling import FillPlan, fill, fill_many, plan_fill
from .views import shares_memory

if TYPE_CHECKING:
    from .environment import Info, info
    from .keras import Constant, Ones, Zeros

__all__ = [
    "Array",
    "Constant",
    "CopyNeededError",
    "DeviceUnavailableError",
    "FillPlan",
    "Info",
    "Ones",
    "OutOfMemoryError",
    "Zeros",
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

_ADAPTERS = {"jax", "keras", "torch"}
_LAZY = {"Constant": "keras", "Info": "environment", "Ones": "keras", "Zeros": "keras", "info": "environment"}


def __getattr__(name: str) -> Any:
    """Import what not every program needs when it is first asked for; with an adapter, its framework."""
    if name in _ADAPTERS:
        return _import_module(f"gpuconst.{name}")
    if name in _LAZY:
        return getattr(_import_module(f"gpuconst.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'gpuconst' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ADAPTERS})
