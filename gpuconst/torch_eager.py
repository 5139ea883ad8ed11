"""The way out of torch.compile, which must not trace code that writes to raw addresses.

Imported when torch.compile first encounters such code.
"""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import trace_rules

__all__ = ["eagerly"]

# Between its graphs, torch.compile still traces what is called there, down to the kernels, except in files
# on its skip list, which it runs. The Keras initializers stay off that list: they have code for it to trace.
_here = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)], "gpuconst.")]
for _name in [*_here, "gpuconst.kernels"]:
    if _name != "gpuconst.keras":
        trace_rules.add(_name)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function between two graphs: torch.compile breaks its graph here."""
    return function(*args, **kwargs)
