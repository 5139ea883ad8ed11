"""Debug logging that does not import `logging`.

Where it has not been imported no handler can be listening, and importing it takes a third of the time that
``import gpuconst`` takes beyond NumPy and ml_dtypes.
"""

import sys

__all__ = ["debug"]


def debug(message: str, *arguments: object) -> None:
    """Log a message of the logger ``gpuconst`` at debug level.

    Parameters
    ----------
    message : str
        With a place for each argument, in the manner of ``%``.
    *arguments
        What goes there.
    """
    get_logger = getattr(sys.modules.get("logging"), "getLogger", None)
    if get_logger is not None:
        get_logger("gpuconst").debug(message, *arguments, stacklevel=2)
