"""Debug logging that does not import `logging`.

If it has not been imported, no handler can be listening. Importing it takes a third of the time that
``import gpuconst`` takes beyond NumPy and ml_dtypes.
"""

import sys

__all__ = ["debug"]


def debug(message: str, *arguments: object) -> None:
    """Log a message at debug level, with the logger ``gpuconst``.

    Parameters
    ----------
    message : str
        A ``%``-style format string.
    *arguments
        Its arguments.
    """
    get_logger = getattr(sys.modules.get("logging"), "getLogger", None)
    if get_logger is not None:
        get_logger("gpuconst").debug(message, *arguments, stacklevel=2)
