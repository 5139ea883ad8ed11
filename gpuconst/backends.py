"""Which backend fills which device, and why the others do not."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from .errors import DeviceUnavailableError, brief
from .kernels import cuda_driver
from .kernels.runs import Region
from .log import debug

__all__ = ["BACKENDS", "Backend", "Place", "load", "select"]


class Row(NamedTuple):
    """What is known about a backend before it is loaded.

    Attributes
    ----------
    device : str
        The kind of device that it serves, ``"cuda"`` or ``"cpu"``.
    module : str
        Its module in `gpuconst.kernels`.
    packages : tuple of str
        The distributions that its library comes in.
    """

    device: str
    module: str
    packages: tuple[str, ...]


#: The backends by name, in the order in which they are tried for a device; the first usable one is taken.
BACKENDS = {
    # CuPy first: RMM and torch can be plugged into its pool.
    "cupy": Row("cuda", "cupy_cuda", ("cupy", "cupy-cuda12x", "cupy-cuda13x")),
    "numba": Row("cuda", "numba_cuda", ("numba-cuda",)),
    "numpy": Row("cpu", "host", ("numpy",)),
}
VARIABLE = "GPUCONST_BACKEND"


class Backend(Protocol):
    """What a backend module offers.

    Everywhere, `index` is that of the device and `stream` the handle of a stream; both are 0 on the CPU. Callers
    vouch for addresses, and keep alive the memory that is there.
    """

    def why_not(self, index: int) -> str | None:
        """Return why device `index` cannot be used through this backend, or None."""

    def current_index(self) -> int:
        """Return the index of the calling thread's current device."""

    def allocate(self, nbytes: int, index: int, stream: int) -> tuple[Any, int]:
        """Return uninitialised memory, which lives as long as the object returned, and its address.

        Parameters
        ----------
        nbytes : int
            Bytes needed.
        index, stream : int
            The device, and the stream that the memory is first used on, and given back on.

        Raises
        ------
        OutOfMemoryError
            If the device has no room.
        RuntimeError
            If a CUDA graph is being captured.
        """

    def carve(self, memory: Any, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return an array over part of the memory, which keeps the memory alive and exports DLPack.

        Parameters
        ----------
        memory : object
            From `allocate` or `full`.
        address : int
            Of the first element.
        shape : tuple of int
            Elements along each dimension.
        dtype : numpy.dtype
            One that the array's library can export.
        """

    def full(self, nbytes: int, element: bytes, index: int, stream: int) -> tuple[Any, int]:
        """Return memory from `allocate`, filled with `element`, and its address."""

    def fill(self, region: Region, index: int, stream: int) -> None:
        """Fill a region of memory, in stream order."""

    def fill_stretch(self, address: int, nbytes: int, element: bytes, index: int, stream: int) -> None:
        """Fill `nbytes` of memory from an address on, a multiple of the element's length; what most fills are."""

    def prepare(self, runs: np.ndarray, strided: Sequence[Region], index: int, stream: int) -> Callable[[int], None]:
        """Return a function that fills many runs in one launch, as often as it is called.

        Parameters
        ----------
        runs : numpy.ndarray of RUN
            Each of at least one byte; none intersects another.
        strided : sequence of Region
            The regions that are not runs, normalised.
        index, stream : int
            The device, and the stream on which a table of the runs is made and given back. Before the first fill
            on another stream, wait for this one.

        Returns
        -------
        callable
            Takes the stream to fill on. While that is being captured into a graph, it only launches kernels, and
            must live as long as the graph.

        Raises
        ------
        OutOfMemoryError
            If there is no memory for the table.
        RuntimeError
            If a table is needed while a graph is being captured.
        """

    def copy(self, target: int, source: int, nbytes: int, index: int, stream: int) -> None:
        """Copy bytes between addresses of device `index` or the host, in stream order."""

    def hand_over(self, memory: Any, first: int, then: int) -> None:
        """Make stream `then` wait for stream `first`, and keep the memory until its work there is done."""

    def order(self, first: int, then: int, index: int) -> None:
        """Make stream `then` wait for the work given to stream `first` so far."""

    def synchronize(self, index: int, stream: int) -> None:
        """Block until the stream has finished."""


@dataclass(frozen=True, slots=True)
class Place:
    """A device, and the backend that serves it.

    Attributes
    ----------
    backend : str
        A key of `BACKENDS`.
    device : str
        ``"cpu"`` or ``"cuda:N"``.
    index : int
        N; 0 for the CPU.
    module : Backend
        The backend's functions.
    """

    backend: str
    device: str
    index: int
    module: Backend


_places: dict[Any, Place] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_places.clear)


def select(device: Any = None) -> Place:
    """Choose the backend for a device.

    ``None`` takes a usable GPU if there is one and the CPU otherwise, and logs why, with a warning if a
    GPU was to be expected; a device that is named is used or refused. ``GPUCONST_BACKEND`` names the
    backend to use for the devices that it serves; it is read when a device is first chosen.

    Parameters
    ----------
    device : str or torch.device, optional
        ``"cpu"``, ``"cuda"`` (the calling thread's current one) or ``"cuda:N"``.

    Returns
    -------
    Place

    Raises
    ------
    ValueError
        If there is no device or backend of that name.
    DeviceUnavailableError
        If a device or backend was requested by name and cannot be used.
    """
    if device is not None and type(device) is not str:
        device = str(device)
    place = _places.get(device)
    if place is None:
        place = _places[device] = _select(device)
    elif place.device != "cpu" and (device is None or device == "cuda"):
        index = place.module.current_index()  # the thread's current GPU can change
        if index != place.index:
            return select(f"cuda:{index}")
    return place


def _select(device: str | None) -> Place:
    forced = os.environ.get(VARIABLE) or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"{VARIABLE}={forced!r} names no backend; there are {', '.join(map(repr, BACKENDS))}")
    if device is None:
        kinds = [BACKENDS[forced].device] if forced else list(dict.fromkeys(row.device for row in BACKENDS.values()))
        index = None
    else:
        kind, index = _parse(device)
        kinds = [kind]
    reasons: dict[str, str] = {}
    for kind in kinds:
        absent = cuda_driver.missing() if kind == "cuda" else None
        for name in _candidates(kind, forced):
            if absent is not None:  # no need to import it, only to be told the same
                reasons[name] = absent
                continue
            module = load(name)
            chosen = index if index is not None else module.current_index()
            reason = module.why_not(chosen)
            if reason is None:
                return _found(name, kind, chosen, module, reasons)
            reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    asked = f"device {device!r}" if device is not None else f"{VARIABLE}={forced}"
    way_out = "; the CPU works everywhere" if device is not None else f"; unset {VARIABLE} to choose among all"
    raise DeviceUnavailableError(f"{asked} cannot be used: {listed}{way_out}")


def _candidates(kind: str, forced: str | None) -> list[str]:
    """Return the backends to try for a kind of device, in order."""
    names = [name for name, row in BACKENDS.items() if row.device == kind]
    return [forced] if forced in names else names


def load(name: str) -> Backend:
    """Import a backend's module, which itself imports no CUDA library until it is used."""
    return cast(Backend, importlib.import_module(f"gpuconst.kernels.{BACKENDS[name].module}"))


_DEVICE = re.compile(r"(?P<cpu>cpu)(:0)?|cuda(:(?P<index>\d+))?", re.ASCII)


def _parse(device: str) -> tuple[str, int | None]:
    found = _DEVICE.fullmatch(device)
    if found is None:
        meant = "; a GPU is 'cuda' here" if device.startswith("gpu") else ""
        raise ValueError(f"unknown device {brief(device)}; devices are 'cpu', 'cuda' and 'cuda:N'{meant}")
    return found["cpu"] or "cuda", int(found["index"]) if found["index"] else None


def _found(name: str, kind: str, index: int, module: Backend, passed_over: dict[str, str]) -> Place:
    for other, reason in passed_over.items():
        debug("backend %s passed over: %s", other, reason)
    if kind == "cpu" and passed_over and cuda_driver.is_expected():
        listed = "; ".join(f"{other}: {reason}" for other, reason in passed_over.items())
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("gpuconst."):
            frame, level = frame.f_back, level + 1  # to the caller's line
        warnings.warn(
            f"gpuconst fills on the CPU, although there is an NVIDIA driver: {listed}; "
            "device='cpu' says that this is meant",
            RuntimeWarning,
            stacklevel=level,
        )
    return Place(name, "cpu" if kind == "cpu" else f"cuda:{index}", index, module)
