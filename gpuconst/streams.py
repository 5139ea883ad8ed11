"""Any stream object, as a handle."""

from __future__ import annotations

from typing import Any

from .backends import Place

__all__ = ["stream_handle"]


def stream_handle(stream: Any, place: Place) -> int:
    """Return the CUDA handle of a stream.

    Parameters
    ----------
    stream : object
        None (the default stream), an int handle, a stream of CuPy, torch, Numba or cuda.core, or
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
    """
    if stream is None:
        return 0
    if place.device == "cpu":
        raise ValueError(f"stream={stream!r} was given, but the result is on the CPU, which has none; drop it")
    index = getattr(stream, "device_index", getattr(stream, "device_id", None))  # torch's; CuPy's
    if isinstance(index, int) and index >= 0 and index != place.index:
        raise ValueError(f"{stream!r} is a stream of cuda:{index}, the memory is on {place.device}")
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for name in ("cuda_stream", "ptr", "handle"):  # torch; CuPy; Numba
        handle = getattr(stream, name, None)
        if handle is not None:
            return int(getattr(handle, "value", handle) or 0)
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    raise TypeError(
        f"{stream!r} is no stream; expected an int handle, a stream of CuPy, torch, Numba or cuda.core, "
        "or an object with __cuda_stream__"
    )
