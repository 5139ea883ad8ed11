"""Objects of NumPy and Python that look like numbers or arrays of them, and are none."""

import numpy as np

NO_NUMBERS = [
    np.float32,
    np.ndarray,
    np.str_("1"),
    np.datetime64(1, "s"),
    np.longdouble(2),  # of a width that no dtype here has
    np.array(None),
    np.array(["1"]),
    np.ma.masked,
    memoryview(b"ab"),
    bytearray(b"ab"),
]
