"""The exceptions that are gpuconst's own, everything else being a built-in one, and what messages show of values."""

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
        Of any kind and size.
    """
    return _brief.repr(value)


def about(error: Exception, what: str, way_out: str = "") -> Exception:
    """Return an error that says what it is about.

    Parameters
    ----------
    error : Exception
        Of any kind.
    what : str
        Put before its message.
    way_out : str
        Put behind it.

    Returns
    -------
    Exception
        Of the same type; the error itself, with a note, where that type takes more than a message.
    """
    try:
        return type(error)(f"{what}: {error}{way_out}")
    except Exception:
        error.add_note(f"{what}{way_out}")
        return error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    return (str(error) or type(error).__name__).splitlines()[0]


class DeviceUnavailableError(RuntimeError):
    """A device or backend was asked for by name and cannot be used; the message says why."""


class OutOfMemoryError(MemoryError):
    """An allocation failed; the message names the request and the device."""


class CopyNeededError(BufferError, ValueError):
    """A copy was forbidden and cannot be avoided.

    DLPack asks for a BufferError, the array API standard for a ValueError.
    """
