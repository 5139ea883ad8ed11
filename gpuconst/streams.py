"""CUDA streams of any library, as handles."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, cast

from .backends import Place
from .kernels import cuda_driver
from .kernels.cuda_lease import Handle

__all__ = ["check_captured", "consumer_handle", "current_streams", "stream_handle"]


def stream_handle(stream: Any, place: Place) -> int:
    """Return the CUDA handle of a stream.

    Parameters
    ----------
    stream : object
        None (the legacy default stream), an int handle, a stream of CuPy, torch, Numba or cuda.core, or
        anything with ``__cuda_stream__``.
    place : Place
        Where the stream is to be used.

    Returns
    -------
    int
        0 is the legacy default stream; 1 and 2 are CUDA's own numbers for the legacy and per-thread ones.

    Raises
    ------
    ValueError
        If `place` is the CPU, which has no streams, or the stream belongs to another device.
    TypeError
        If the object is not a stream.
    RuntimeError
        If `stream` is None, and a framework is capturing a CUDA graph on another stream.
    """
    if stream is None:
        if place.device != "cpu":
            check_captured(0, place)
        return 0
    if place.device == "cpu":
        raise ValueError(f"stream={stream!r} was given, but the result is on the CPU, which has none; drop it")
    index = getattr(stream, "device_index", getattr(stream, "device_id", None))  # torch's; CuPy's
    if isinstance(index, int) and index >= 0 and index != place.ordinal:
        raise ValueError(f"{stream!r} is a stream of cuda:{index}, the memory is on {place.device}")
    if hasattr(stream, "__cuda_stream__"):
        return cast(int, Handle(stream.__cuda_stream__()[1], stream))
    for name in ("cuda_stream", "ptr", "handle"):  # torch; CuPy; Numba
        handle = getattr(stream, name, None)
        if handle is not None:
            return cast(int, Handle(getattr(handle, "value", handle) or 0, stream))
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    raise TypeError(
        f"{stream!r} is no stream; expected an int handle, a stream of CuPy, torch, Numba or cuda.core, "
        "or an object with __cuda_stream__"
    )


def consumer_handle(stream: Any) -> int | None:
    """Return the handle of the stream that a DLPack consumer names.

    Parameters
    ----------
    stream : int, optional
        Numbered as in the array API standard: None or 1 for the legacy default stream, 2 for the
        per-thread one, -1 for no synchronisation, else a handle.

    Returns
    -------
    int or None
        None if the consumer wants no synchronisation.

    Raises
    ------
    ValueError
        If `stream` is 0, which the standard leaves ambiguous, or is not a stream number.
    """
    if stream is None:
        return 1
    if not isinstance(stream, int) or isinstance(stream, bool) or stream == 0 or stream < -1:
        raise ValueError(
            f"stream={stream!r} is no CUDA stream number of DLPack; expected None, 1 (legacy default), "
            "2 (per-thread default), -1 (no synchronisation) or a handle"
        )
    return None if stream == -1 else stream


def check_captured(handle: int, place: Place) -> None:
    """Raise if a framework is capturing a CUDA graph that work on the given stream would not be part of.

    Parameters
    ----------
    handle : int
        Handle of the given stream.
    place : Place
        Where the stream is; not the CPU.

    Raises
    ------
    RuntimeError
        If the current stream of torch or CuPy is another one and is being captured.
    """
    for theirs, name in _may_be_captured(place.ordinal):
        if theirs != handle and theirs and cuda_driver.is_capturing(place.ordinal, theirs):
            raise RuntimeError(
                f"a CUDA graph is being captured on {name}, and what goes to another stream runs now, not when the "
                f"graph does; pass stream={name}"
            )


def _may_be_captured(ordinal: int) -> Iterator[tuple[int, str]]:
    """Yield the current stream of each framework, and its name, unless it is known not to be captured."""
    # A module that is still being imported may lack its parts.
    torch, cupy = (getattr(sys.modules.get(name), "cuda", None) for name in ("torch", "cupy"))
    if torch is not None and torch.is_initialized():
        asked = torch.current_device() == ordinal  # is_current_stream_capturing() knows no other device
        if not asked or torch.is_current_stream_capturing():
            yield torch.current_stream(ordinal).cuda_stream, "torch.cuda.current_stream()"
    if cupy is not None:
        current = 0
        with contextlib.suppress(Exception):  # CuPy can be imported and still not work
            current = cupy.get_current_stream(ordinal).ptr
        yield current, "cupy.cuda.get_current_stream()"


def current_streams(kinds: Iterable[type], ordinal: int) -> list[int]:
    """Return the handles of the current streams of the frameworks that some arrays belong to.

    Parameters
    ----------
    kinds : iterable of type
        Types of the arrays.
    ordinal : int
        Index of the GPU.

    Returns
    -------
    list of int
        One for each framework that has a current stream there, torch's first.
    """
    handles = []
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    tensor, array = getattr(torch, "Tensor", ()), getattr(cupy, "ndarray", ())
    if torch is not None and any(issubclass(kind, tensor) for kind in kinds) and torch.cuda.is_initialized():
        handles.append(int(torch.cuda.current_stream(ordinal).cuda_stream))
    if cupy is not None and any(issubclass(kind, array) for kind in kinds):
        current = cupy.cuda.get_current_stream(ordinal)
        handles.append(Handle(current.ptr, current))  # CuPy destroys the stream with its object
    return handles
