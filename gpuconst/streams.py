"""CUDA streams of any library, as handles."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

from .backends import Place
from .kernels import cuda_driver
from .kernels.cuda_lease import Handle

__all__ = ["check_captured", "consumer_handle", "current_streams", "stream_handle", "torch_stream"]


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
        raise ValueError(f"stream={stream!r} was given, but the memory is on the CPU, which has none; drop it")
    index = getattr(stream, "device_index", getattr(stream, "device_id", None))  # torch's; CuPy's
    if isinstance(index, int) and index >= 0 and index != place.index:
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


def consumer_handle(stream: Any, index: int) -> int | None:
    """Return the handle of the stream that a DLPack consumer names.

    The handle keeps the stream alive if it is CuPy's current one, which CuPy itself names: CuPy destroys a stream
    with its object, which may be before the memory is given back.

    Parameters
    ----------
    stream : int, optional
        Numbered as in the array API standard: None or 1 for the legacy default stream, 2 for the
        per-thread one, -1 for no synchronisation, else a handle.
    index : int
        Index of the GPU.

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
    if stream == -1:
        return None
    current = _cupy_stream(index)
    return Handle(stream, current) if current is not None and current.ptr == stream else stream


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
    index = place.index
    torch = torch_stream(index)
    if torch and torch != handle and cuda_driver.is_capturing(index, torch):
        raise _would_be_missing(f"torch.cuda.current_stream({index})")
    current = _cupy_stream(index)
    cupy = current.ptr if current is not None else 0
    if cupy and cupy != handle and cuda_driver.is_capturing(index, cupy):
        raise _would_be_missing(f"cupy.cuda.get_current_stream({index})")


def _would_be_missing(stream: str) -> RuntimeError:
    return RuntimeError(
        f"a CUDA graph is being captured on {stream}, and what goes to another stream runs now, not when the "
        f"graph does; pass stream={stream}"
    )


def torch_stream(index: int) -> int:
    """Return the handle of torch's current stream on a device; 0 if torch has not used CUDA."""
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)  # missing while torch is being imported
    if cuda is None or not cuda.is_initialized():
        return 0
    # What torch's compiled code calls; making an object of the stream would take 20 times as long.
    return cast(int, torch._C._cuda_getCurrentRawStream(index))


def _cupy_stream(index: int) -> Any:
    """Return CuPy's current stream on a device; None if CuPy is not in use."""
    cuda = getattr(sys.modules.get("cupy"), "cuda", None)
    if cuda is None:
        return None
    try:
        return cuda.get_current_stream(index)
    except Exception:  # it can be imported and still not work
        return None


def current_streams(kinds: Iterable[type], index: int) -> list[int]:
    """Return the handles of the current streams of the frameworks that some arrays belong to.

    Parameters
    ----------
    kinds : iterable of type
        Types of the arrays.
    index : int
        Index of the GPU.

    Returns
    -------
    list of int
        One for each framework that has a current stream there, torch's first.
    """
    handles = []
    tensor, array = getattr(sys.modules.get("torch"), "Tensor", ()), getattr(sys.modules.get("cupy"), "ndarray", ())
    if any(issubclass(kind, tensor) for kind in kinds):
        handles.append(torch_stream(index))
    if any(issubclass(kind, array) for kind in kinds):
        current = _cupy_stream(index)
        handles.append(Handle(current.ptr, current))  # see `consumer_handle`
    return handles
