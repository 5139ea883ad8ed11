"""CuPy on the stand-in driver: what it calls of CUDA's runtime, `standin/cudart.c` in place of its own.

CuPy is linked to a runtime that asks a driver for tables which no document describes. Its modules find the
functions of that runtime in a table of C pointers as they are imported, and in that table they are replaced.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_DEVICE = 2  # cudaMemoryTypeDevice
_kept: list[Any] = []  # that C code points to


def install(library: Path) -> None:
    """Give CuPy the stand-in's runtime; nothing of CuPy may have been imported.

    Parameters
    ----------
    library : Path
        `cudart.c`, compiled.
    """
    from cupy_backends.cuda.api import runtime

    cudart = ctypes.PyDLL(str(library))
    table = runtime.__pyx_capi__
    check = ctypes.c_void_p.in_dll(cudart, "cupy_check_status")
    check.value = _capsule_pointer(table["check_status"], _capsule_name(table["check_status"]))
    replaced = {name: getattr(cudart, f"cupy_{name}", None) for name in table if name != "check_status"}
    driver = ctypes.CDLL("libcuda.so.1")

    def attributes(address: int, _: int) -> Any:
        index = ctypes.c_int()
        driver.cuPointerGetAttribute(ctypes.byref(index), 9, ctypes.c_uint64(address))  # DEVICE_ORDINAL
        return runtime.PointerAttributes(index.value, 0, address, _DEVICE)

    replaced["pointerGetAttributes"] = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_ssize_t, ctypes.c_int)(attributes)
    for name, function in replaced.items():
        if function is not None:
            signature = _capsule_name(table[name])
            _kept.append((function, signature))
            table[name] = _new_capsule(ctypes.cast(function, ctypes.c_void_p), signature, None)
    for name in ("getDevice", "getDeviceCount", "setDevice"):  # which Python code calls too
        function = getattr(cudart, f"cupy_{name}")
        function.restype = ctypes.py_object if name == "setDevice" else ctypes.c_int
        setattr(runtime, name, lambda *arguments, function=function: function(*arguments, 0))
