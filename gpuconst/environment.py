"""`info`: the devices and backends of this machine, and why any of them cannot be used."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .backends import BACKENDS, load, select
from .errors import DeviceUnavailableError
from .kernels import cuda_driver

__all__ = ["BackendInfo", "Info", "info"]

#: Seconds that a GPU has to answer, including the time to import libraries, perhaps over a network.
PATIENCE = 60

_FRAMEWORKS = ["keras", "torch", "jax", "tensorflow", "tensorflow-cpu", "numpy", "ml_dtypes"]


@dataclass(frozen=True)
class BackendInfo:
    """One backend on this machine.

    Attributes
    ----------
    name : str
        A name that ``GPUCONST_BACKEND`` takes.
    device : str
        The kind of device it serves.
    version : str or None
        Version of its library; None if that is not installed.
    why_not : str or None
        Why it cannot be used; None if it can.
    """

    name: str
    device: str
    version: str | None
    why_not: str | None


@dataclass(frozen=True)
class Info:
    """What `info` found; ``str()`` gives a table, and `asdict` the same as plain data for JSON.

    Attributes
    ----------
    version : str
        Version of gpuconst.
    python, system : str
        Version of Python, and the system and machine that it runs on.
    default : str
        What ``device=None`` gives, as ``"device (backend)"``, or why it gives nothing.
    driver : str or None
        The CUDA version that the NVIDIA driver supports; None without a driver.
    devices : tuple of str
        Name, compute capability and memory of each GPU.
    backends : tuple of BackendInfo
        In the order in which they are tried.
    frameworks : dict of str to str
        Installed frameworks and their versions.
    """

    version: str
    python: str
    system: str
    default: str
    driver: str | None
    devices: tuple[str, ...]
    backends: tuple[BackendInfo, ...]
    frameworks: dict[str, str]

    def asdict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"gpuconst {self.version}, Python {self.python}, {self.system}",
            f"default device: {self.default}",
            f"NVIDIA driver: {f'CUDA {self.driver}' if self.driver else 'none'}",
            *(f"  cuda:{index}: {device}" for index, device in enumerate(self.devices)),
            "backends, in the order they are tried:",
        ]
        for row in self.backends:
            state = "usable" if row.why_not is None else f"not usable: {row.why_not}"
            lines.append(f"  {row.name:<6} {row.device:<5} {row.version or '-':<10} {state}")
        lines.append("frameworks: " + ", ".join(f"{name} {version}" for name, version in self.frameworks.items()))
        return "\n".join(lines)


def info() -> Info:
    """Describe devices, backends and versions, with the reason why any of them cannot be used.

    The GPU is queried in a separate process, so that this one can still fork. Only if this process was itself
    forked after CUDA was used is the GPU queried here, where the answer differs.

    Returns
    -------
    Info
    """
    found = _probe()
    return Info(
        version=_version(["gpuconst"]) or "unknown",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        frameworks={name: version for name in _FRAMEWORKS if (version := _version([name]))},
        default=found["default"],
        driver=found["driver"],
        devices=tuple(found["devices"]),
        backends=tuple(
            BackendInfo(name, row.device, _version(row.packages), found["why_not"][name])
            for name, row in BACKENDS.items()
        ),
    )


def _version(distributions: Iterable[str]) -> str | None:
    import importlib.metadata  # not at the top: it imports email, zipfile and socket

    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _probe() -> dict[str, Any]:
    """Run `print_probe` in a new interpreter, and wait at most `PATIENCE` seconds for it."""
    import json
    import subprocess

    if cuda_driver.forked():  # a new process could use CUDA, this one cannot
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the answer says the same
            return _look()
    code = "from gpuconst import environment; environment.print_probe()"
    # The child imports from where this process does, whatever was done to its sys.path.
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return _failed(f"no answer within {PATIENCE} s; the driver hangs")
    if done.returncode:
        return _failed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _failed(why: str) -> dict[str, Any]:
    reason = f"the probe of the GPU failed: {why}"
    return {
        "default": f"none: {reason}",
        "driver": None,
        "devices": [],
        "why_not": {name: reason if row.device != "cpu" else None for name, row in BACKENDS.items()},
    }


def print_probe() -> None:
    """Print what can be used, as the last line, of JSON; run in a process of its own, which it ends."""
    import json

    print(json.dumps(_look()), flush=True)
    os._exit(0)  # what else is printed, or crashes, as Python ends is no part of the answer


def _look() -> dict[str, Any]:
    """Query the driver and the backends in this process."""
    found = cuda_driver.driver()
    try:
        place = select(None)
        default = f"{place.device} ({place.backend})"
    except (DeviceUnavailableError, ValueError) as error:
        default = f"none: {error}"
    return {
        "default": default,
        "driver": cuda_driver.dotted(found.version) if found.version else None,
        "devices": [
            f"{device.name}, compute capability {'.'.join(map(str, device.capability))}, "
            f"{device.nbytes / 2**30:.0f} GiB"
            for device in found.devices
        ],
        "why_not": {name: load(name).why_not(0) for name in BACKENDS},
    }
