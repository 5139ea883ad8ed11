"""CUDA through Numba and cuda.core: kernels in Python, a memory pool of its own; no CuPy."""

from __future__ import annotations

import functools
import re
from typing import Any

from .runs import THREADS


@functools.cache
def _compiled_with() -> Any:
    """Return Numba's CUDA module and the kernels."""
    # Where packages were installed with --target, the .pth that loads it at startup was not processed,
    # and `numba.cuda` would be the target that is built into Numba.
    import _numba_cuda_redirector  # noqa: F401
    from numba import cuda

    from . import numba_kernels

    return cuda, numba_kernels.kernels(numba_kernels.store)


def compile_kernels(arch: str) -> dict[str, bytes]:
    """Compile the kernels; needs NVVM and nvJitLink, but no GPU and no driver.

    Parameters
    ----------
    arch : str
        Such as ``"sm_90"``.

    Returns
    -------
    dict of str to bytes
        A cubin for each kernel, by name.
    """
    return {name: _link(ptx, arch) for name, ptx in compile_ptx(arch).items()}


def compile_ptx(arch: str) -> dict[str, str]:
    """Compile the kernels to PTX, which their cubins are linked from.

    Parameters
    ----------
    arch : str
        Such as ``"sm_90"``.

    Returns
    -------
    dict of str to str
        PTX for each kernel, by name.
    """
    _, kernels = _compiled_with()
    return {name: _compile(name, arch) for name in kernels}


def _compile(name: str, arch: str) -> str:
    cuda, kernels = _compiled_with()
    function, parameters = kernels[name]
    capability = divmod(int(arch.removeprefix("sm_")), 10)
    ptx, _ = cuda.compile(
        function, cuda.types.void(*parameters), device=False, abi="numba", cc=capability, launch_bounds=THREADS
    )
    mangled = re.search(r"\.entry (\w+)", ptx)
    assert mangled is not None
    return str(ptx).replace(mangled[1], name)


def _link(ptx: str, arch: str) -> bytes:
    # To a cubin, here: the PTX of a new compiler would be refused by an older driver.
    from cuda.core import Linker, LinkerOptions, ObjectCode

    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch=arch))
    return bytes(linker.link("cubin").code)
