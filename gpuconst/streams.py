"""Any stream object, as a handle."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Self

from .backends import Place
from .kernels import cuda_driver

__all__ = ["check_captured", "consumer_handle", "current_streams", "stream_handle"]


class _Handle(int):
    """A handle that keeps its stream alive: memory is given back on it, long after the call it was given to."""

    owner: Any

    def __new__(cls, value: int, owner: Any) -> Self:
        handle = super().__new__(cls, value)
        handle.owner = owner
        return handle


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
        0 is the legacy default stream, 1 and 2 CUDA's own names of the legacy and per-thread ones.

    Raises
    ------
    ValueError
        If `place` is the CPU, which has no streams, or the stream belongs to another device.
    TypeError
        If the object is no stream.
    RuntimeError
        If it is None, and a framework is capturing a CUDA graph on another one.
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
        return _Handle(stream.__cuda_stream__()[1], stream)
    for name in ("cuda_stream", "ptr", "handle"):  # torch; CuPy; Numba
        handle = getattr(stream, name, None)
        if handle is not None:
            return _Handle(getattr(handle, "value", handle) or 0, stream)
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
        As the array API standard numbers CUDA streams: None or 1 the legacy default stream, 2 the
        per-thread one, -1 no synchronisation, else a handle.

    Returns
    -------
    int or None
        None where the consumer wants no synchronisation.

    Raises
    ------
    ValueError
        If it is 0, which the standard leaves ambiguous, or no stream's number.
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
    """Raise where a framework captures a CUDA graph, of which work on a stream that nobody named would be no part.

    Parameters
    ----------
    handle : int
        Of the stream.
    place : Place
        Where it is; not the CPU.

    Raises
    ------
    RuntimeError
        If the current stream of torch or CuPy is another one, and is being captured.
    """
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # of a torch that is being imported there is none
    current, name = handle, ""
    if cuda is not None and cuda.is_initialized() and cuda.is_current_stream_capturing():
        current, name = cuda.current_stream(place.ordinal).cuda_stream, "torch.cuda.current_stream()"
    elif place.backend == "cupy":  # CuPy can be there and not work, when the backend is another
        theirs = sys.modules["cupy"].cuda.get_current_stream(place.ordinal).ptr
        if theirs and theirs != handle and cuda_driver.is_capturing(place.ordinal, theirs):
            current, name = theirs, "cupy.cuda.get_current_stream()"
    if current != handle:
        raise RuntimeError(
            f"a CUDA graph is being captured on {name}, and what goes to another stream runs now, not when the graph "
            f"does; pass stream={name}"
        )


def current_streams(kinds: Iterable[type], ordinal: int) -> list[int]:
    """Return the handles of the streams on which the frameworks of some arrays work at the moment.

    Parameters
    ----------
    kinds : iterable of type
        Of the arrays.
    ordinal : int
        Of the GPU.

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
        handles.append(int(cupy.cuda.get_current_stream(ordinal).ptr))
    return handles
