"""Host memory for the tensors of a torch module: filled as it is allocated, and owned by each tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .dtypes import DType
from .kernels import host
from .kernels.host_fill import SMALLEST_SHARED
from .kernels.host_threads import share

__all__ = ["HostTensor", "host_tensors"]


class HostTensor(NamedTuple):
    """A tensor to be made.

    Attributes
    ----------
    shape : tuple of int
        Elements along each dimension.
    dtype : torch.dtype
        The torch dtype that `row` is.
    row : DType
        Dtype of the elements.
    element : bytes or None
        What to fill it with; None leaves it uninitialised.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    row: DType
    element: bytes | None


def host_tensors(specs: Sequence[HostTensor]) -> list[torch.Tensor]:
    """Return new tensors, each owning memory from gpuconst, whose huge pages halve the time of the first touch.

    Large ones are filled by two threads, as a single large array is.

    Parameters
    ----------
    specs : sequence of HostTensor
        What to make.

    Raises
    ------
    OutOfMemoryError
        If the host has no memory left.
    """
    carriers: list[Any] = [None] * len(specs)
    sizes = [math.prod(spec.shape) * spec.row.itemsize for spec in specs]

    def make(position: int) -> None:
        shape, _, row, element = specs[position]
        nbytes = sizes[position]
        memory, address = host.allocate(nbytes, 0, 0) if element is None else host.full(nbytes, element, 0, 0)
        carriers[position] = host.carve(memory, address, shape, row.carrier)

    large = [
        position
        for position, (spec, size) in enumerate(zip(specs, sizes, strict=True))
        if spec.element is not None and size >= SMALLEST_SHARED
    ]
    share([functools.partial(make, position) for position in large])
    for position, carrier in enumerate(carriers):
        if carrier is None:
            make(position)
    return [
        torch.from_numpy(carrier) if spec.row.native else torch.from_numpy(carrier).view(spec.dtype)
        for carrier, spec in zip(carriers, specs, strict=True)
    ]
