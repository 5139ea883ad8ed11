"""Debug logging that does not import `logging`.

If it has not been imported, no handler can be listening. Importing it takes a third of the time that
``import gpuconst`` takes beyond NumPy and ml_dtypes.
"""

import sys
from typing import Any

__all__ = ["debug"]

_logger: Any = None


def debug(message: str, *arguments: object) -> None:
    """Log a message at debug level, with the logger ``gpuconst``.

    Parameters
    ----------
    message : str
        A ``%``-style format string.
    *arguments
        Its arguments.
    """
    global _logger
    if _logger is None:
        get_logger = getattr(sys.modules.get("logging"), "getLogger", None)
        if get_logger is None:
            return
        _logger = get_logger("gpuconst")
    _logger.debug(message, *arguments, stacklevel=2)
