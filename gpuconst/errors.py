"""The exceptions that are gpuconst's own; everything else is a built-in one."""


class DeviceUnavailableError(RuntimeError):
    """A device or backend was asked for by name and cannot be used; the message says why."""


class OutOfMemoryError(MemoryError):
    """An allocation failed; the message names the request and the device."""
