"""Keras' own tests of its constant initializers, from its wheel, with ours in place of Keras' classes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from installed import each

UPSTREAM = "src/initializers/constant_initializers_test.py"

# The test file takes `skip_if_backend` from the conftest of Keras' repository, which is not in its wheel.
CONFTEST = """
import keras
import pytest
from gpuconst.keras import Constant, Ones, Zeros
from keras.src import initializers

initializers.Constant, initializers.Ones, initializers.Zeros = Constant, Ones, Zeros


def skip_if_backend(name, reason):
    return pytest.mark.skipif(keras.backend.backend() == name, reason=reason)
"""


@pytest.mark.needs("keras")
@pytest.mark.parametrize("backend", each("tensorflow", "jax", "torch"))
def test_upstream(backend: str, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("keras")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / UPSTREAM
    (tmp_path / source.name).write_text(source.read_text())
    (tmp_path / "conftest.py").write_text(CONFTEST)
    # The file imports from `conftest` by name: the folder is on the path, as in Keras' repository.
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--import-mode=prepend", source.name]
    done = subprocess.run(
        command,
        env={**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("zeros", "ones", "constant", "constant_initializer_array_value"):
        test = name if name.startswith("constant_") else f"{name}_initializer"
        assert f"test_{test} PASSED" in done.stdout
