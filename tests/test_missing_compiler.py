"""A GPU, but not all of the CUDA libraries that the backends compile with: each missing one is a reason of its own.

The GPU is the stand-in's. The libraries are missing for real: the environment has the headers of NVIDIA's packages
and nothing else, and the dynamic loader looks first in a folder with links to the libraries that are there, and
with an empty file for one that is not, so that it is not found either where the system has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from cuda_standin import environment

pathfinder = pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
pytestmark = pytest.mark.needs("cupy", "numba_cuda")

#: What the loader is asked for, by library.
FILES = {
    "nvrtc": ("libnvrtc.so.13", "libnvrtc.so.12"),
    "nvvm": ("libnvvm.so.4", "libnvvm.so"),
    "nvJitLink": ("libnvJitLink.so.13", "libnvJitLink.so.12"),
    "cudart": ("libcudart.so.13", "libcudart.so.12"),
}
INSTALL = "pip install 'gpuconst[cuda12]' or 'gpuconst[cuda13]'"


def why_not_without(missing: str, folder: Path) -> dict[str, str | None]:
    """Return why each backend is not usable, by `gpuconst info`, where there is a GPU but not one of the libraries."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    installed = Path(pathfinder.__file__).parents[2]
    for entry in installed.iterdir():
        if entry.name != "nvidia":
            (site / entry.name).symlink_to(entry)
    for headers in installed.glob("nvidia/*/include"):
        here = site / headers.relative_to(installed)
        here.parent.mkdir(parents=True)
        here.symlink_to(headers)
    libraries = folder / "libraries"
    libraries.mkdir()
    for library, files in FILES.items():
        # NVVM is not on a system's library path: it is found by where the CUDA runtime is.
        if library == missing or (library == "cudart" and missing == "nvvm"):
            for file in files:
                (libraries / file).touch()
        else:
            found = Path(pathfinder.load_nvidia_dynamic_lib(library).abs_path)
            (libraries / found.name).symlink_to(found)
    variables = {**os.environ, **environment(GPUCONST_BACKEND="")}
    for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        variables.pop(name, None)
    variables["LD_LIBRARY_PATH"] = f"{libraries}{os.pathsep}{variables['LD_LIBRARY_PATH']}"
    command = [str(folder / "bin" / "python"), "-P", "-m", "gpuconst", "info", "--json"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found_info = json.loads(done.stdout)
    assert len(found_info["devices"]) == 2
    return {row["name"]: row["why_not"] for row in found_info["backends"]}


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in driver needs Linux")
@pytest.mark.parametrize(
    ("missing", "backend", "reason"),
    [
        ("nothing", None, ""),
        ("nvrtc", "cupy", "CuPy's compiler NVRTC cannot be loaded"),
        ("nvvm", "numba", "Numba's compiler library nvvm cannot be loaded"),
        ("nvJitLink", "numba", "Numba's compiler library nvJitLink cannot be loaded"),
        ("cudart", "numba", "Numba's compiler library cudart cannot be loaded"),
    ],
)
def test_the_missing_library_is_named_with_what_to_install(
    missing: str, backend: str | None, reason: str, tmp_path: Path
) -> None:
    found = why_not_without(missing, tmp_path)
    if backend is not None:
        told = str(found[backend])
        assert told.startswith(reason)
        assert told.endswith(INSTALL)
    if backend != "numba":
        assert found["numba"] is None
    if backend != "cupy":
        assert "CuPy cannot use CUDA" in str(found["cupy"])  # what it says on the stand-in, its compiler being there
    assert found["numpy"] is None
