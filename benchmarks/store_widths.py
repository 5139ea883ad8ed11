"""The compiled kernels: store widths, local memory and registers, read from the machine code.

Run as ``python -m benchmarks.store_widths [sm_90 ...]``; needs ``nvidia-cuda-nvdisasm``, but no GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
BACKENDS = ("cupy_cuda", "numba_cuda")

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/ +(@\S+ +)?(\w+)([.\w]*)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "U8": 1}
_JUMPS = {"BRA", "CALL", "EXIT", "RET"}
# Attributes of the functions in a cubin: a format, a name, a size; then the function and the value.
_REGISTERS = re.compile(rb"\x04\x2f\x08\x00.{4}(.{4})", re.DOTALL)
_FRAMES = re.compile(rb"\x04\x11\x08\x00.{4}(.{4})", re.DOTALL)


class Code(NamedTuple):
    """A kernel as machine code.

    Attributes
    ----------
    stores : list of int
        The bytes that each store to global memory writes.
    block : int
        The largest number of 16-byte stores in a row under one condition.
    generic : int
        Number of stores that must first find out which memory their address is in.
    local : int
        Bytes of local memory per thread, plus the number of loads and stores of it.
    registers : int
        Registers per thread; the most of any function in the file.
    """

    stores: list[int]
    block: int
    generic: int
    local: int
    registers: int


def nvdisasm() -> Path:
    """Return the path of the disassembler.

    Raises
    ------
    FileNotFoundError
        If its package is not installed.
    """
    for package in ("nvidia-cuda-nvdisasm", "nvidia-cuda-nvdisasm-cu12"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.stem == "nvdisasm":
                return Path(str(file.locate()))
    raise FileNotFoundError("nvdisasm is not installed; pip install nvidia-cuda-nvdisasm")


def read(cubin: bytes) -> Code:
    """Disassemble a kernel.

    Parameters
    ----------
    cubin : bytes
        Machine code of one kernel.

    Returns
    -------
    Code
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([nvdisasm(), "-c", path], check=True, capture_output=True, text=True).stdout
    stores, generic = [], 0
    local = sum(_values(_FRAMES, cubin))
    block, longest, before = 0, 0, ""
    for condition, name, suffix in _INSTRUCTION.findall(text):
        if name == "STG":
            stores.append(next((_WIDTHS[part] for part in suffix.split(".") if part in _WIDTHS), 4))
            if stores[-1] == 16:
                block = block + 1 if condition == before else 1
                before = condition
                longest = max(longest, block)
        elif name in _JUMPS:
            block = 0
        generic += name == "ST"
        local += name in ("LDL", "STL")
    return Code(stores, longest, generic, local, max(_values(_REGISTERS, cubin)))


def _values(attribute: re.Pattern[bytes], cubin: bytes) -> list[int]:
    return [int.from_bytes(value, "little") for value in attribute.findall(cubin)]


def main(architectures: list[str]) -> None:
    """Print a table of all kernels of both backends."""
    row = "{:<12}{:<14}{:<16}{:<11}{:<7}{:<10}{}"
    print(row.format("backend", "architecture", "kernel", "registers", "local", "in a row", "bytes a store x stores"))
    for backend in BACKENDS:
        module = importlib.import_module(f"gpuconst.kernels.{backend}")
        for arch in architectures or ARCHITECTURES:
            for name, cubin in module.compile_kernels(arch).items():
                code = read(cubin)
                widths = "  ".join(f"{width} x {count}" for width, count in sorted(Counter(code.stores).items()))
                print(row.format(backend, arch, name, code.registers, code.local, code.block, widths))


if __name__ == "__main__":
    main(sys.argv[1:])
