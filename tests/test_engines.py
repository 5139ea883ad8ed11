"""The examples on engines of many processes: each runs, and none holds more than its part of the array."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
#: For each example what it needs, and the largest part of the whole that a process may hold: half of it and
#: what the engine takes for itself, of dask two of the sixteen blocks.
ENGINES = {
    "jax_two_processes": ("jax", 0.6),
    "fsdp_two_processes": ("torch", 0.6),
    "dask_two_workers": ("distributed", 0.15),
    "ray_actors": ("ray", 0.6),
}


def test_every_example_is_run_and_short() -> None:
    found = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(found) == set(ENGINES)
    assert max(found.values()) < 60


@pytest.mark.skipif(sys.platform != "linux", reason="the examples read their peak memory in /proc")
@pytest.mark.parametrize("name", ENGINES)
def test_an_example_runs_within_its_memory(name: str, tmp_path: Path) -> None:
    needed, part = ENGINES[name]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    command = [sys.executable, "-P", str(EXAMPLES / f"{name}.py")]
    # Engines keep settings and tokens of their own in the home folder.
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    grown = re.findall(r"peak grew by (\d+) MiB, the \w+ has (\d+) MiB", done.stdout)
    assert len(grown) == 2, done.stdout
    for mine, whole in grown:
        assert int(mine) < part * int(whole), done.stdout
