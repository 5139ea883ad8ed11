"""What all tests share."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
from installed import require

from gpuconst.kernels.cuda_driver import driver

# Or JAX takes most of a GPU from the tests that do not know of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (why_not := driver().why_not):
        pytest.skip(f"no GPU: {why_not}")
    for marker in item.iter_markers("needs"):
        for package in marker.args:
            require(package)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run code in an interpreter of its own and return what it printed; it must succeed."""

    def run(code: str, **environment: str) -> str:
        # -P: the installed package, not the folder of the same name in the working directory.
        command = [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
