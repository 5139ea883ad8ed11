"""A machine that has Numba but not the CUDA libraries it compiles with, for real: an import path without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

numba = pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

ROOT = Path(__file__).parents[1]
CODE = "from gpuconst.kernels import numba_cuda; print(numba_cuda._missing_package(), numba_cuda._missing_compiler())"


@pytest.mark.skipif(sys.platform != "linux", reason="the import path is made of symbolic links")
def test_the_missing_library_is_named_with_what_to_install(tmp_path: Path) -> None:
    for entry in Path(numba.__file__).parents[1].iterdir():
        if entry.name not in ("nvidia", "gpuconst"):
            (tmp_path / entry.name).symlink_to(entry)
    package = tmp_path / "gpuconst"
    package.mkdir()
    for entry in (ROOT / "gpuconst").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    # -S: no site-packages but the one made here.
    command = [sys.executable, "-S", "-P", "-c", CODE]
    run = subprocess.run(
        command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if run.stdout == "None None\n":
        pytest.skip("this system has NVVM and nvJitLink outside of the environment")
    assert run.stdout.startswith("None Numba's compiler library nv")
    assert "cannot be loaded" in run.stdout
    assert "pip install 'gpuconst[cuda12]' or 'gpuconst[cuda13]'" in run.stdout
