"""The exceptions that are gpuconst's own; everything else is a built-in one."""


class DeviceUnavailableError(RuntimeError):
    """A device or backend was asked for by name and cannot be used; the message says why."""


class OutOfMemoryError(MemoryError):
    """An allocation failed; the message names the request and the device."""


class CopyNeededError(BufferError, ValueError):
    """A copy was forbidden and cannot be avoided.

    DLPack asks for a BufferError, the array API standard for a ValueError.
    """
