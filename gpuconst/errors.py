"""gpuconst's own exceptions (all others that it raises are built-in ones), and helpers for error messages."""

import reprlib
from typing import Any

__all__ = ["CopyNeededError", "DeviceUnavailableError", "OutOfMemoryError", "about", "brief", "first_line"]

_brief = reprlib.Repr()
_brief.maxother = _brief.maxstring = _brief.maxlong = 120


def brief(value: Any) -> str:
    """Return the repr of a value, shortened for a message.

    Parameters
    ----------
    value : object
        Any object, of any size.
    """
    return _brief.repr(value)


def about(error: Exception, what: str, way_out: str = "") -> Exception:
    """Return the error with its subject in the message.

    Parameters
    ----------
    error : Exception
        The original error.
    what : str
        Text to put before its message.
    way_out : str
        Text to put after it.

    Returns
    -------
    Exception
        A new error of the same type or, if that type takes more than a message, the error itself with a note.
    """
    try:
        return type(error)(f"{what}: {error}{way_out}")
    except Exception:
        error.add_note(f"{what}{way_out}")
        return error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class DeviceUnavailableError(RuntimeError):
    """The device or backend that a call needs cannot be used; the message says why."""


class OutOfMemoryError(MemoryError):
    """An allocation failed; the message names the size requested and the device."""


class CopyNeededError(BufferError, ValueError):
    """A copy is needed, but was forbidden.

    It is both a BufferError, as DLPack specifies, and a ValueError, as the array API standard does.
    """
