"""The README's code runs and prints what the README shows, and its commands are the ones that CI runs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.needs("torch", "jax")
def test_first_example_prints_what_is_shown() -> None:
    code, shown = _blocks("python")[0], _blocks("text")[0]
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == shown
    assert len(code.strip().splitlines()) < 10


@pytest.mark.needs("torch", "keras", "jax")
@pytest.mark.parametrize("code", _blocks("python")[1:])
def test_the_other_examples_run(code: str, run_python: Callable[..., str]) -> None:
    run_python(code, CUDA_VISIBLE_DEVICES="", KERAS_BACKEND="jax")


def test_quick_start_has_two_commands_and_ci_runs_the_second() -> None:
    quick_start = README.split("## Quick start")[1].split("\n## ")[0]
    commands = re.findall(r"^```sh\n(.*?)\n```$", quick_start, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("failing", ["python3", "pip", "python", "ruff", "mypy"])
def test_ci_fails_where_any_of_its_commands_does(failing: str, tmp_path: Path) -> None:
    tools = tmp_path / ".venv-test" / "bin"
    tools.mkdir(parents=True)
    for name in ("python3", "pip", "python", "ruff", "mypy"):
        (tools / name).write_text(f"#!/bin/sh\nexit {int(name == failing)}\n")
        (tools / name).chmod(0o755)
    script = tmp_path / ".ci" / "run"
    script.parent.mkdir()
    shutil.copy(ROOT / ".ci" / "run", script)
    done = subprocess.run(["bash", script], env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode != 0


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.needs("torch", "jax", "tensorflow")
def test_the_support_table_is_what_is_found() -> None:
    command = [sys.executable, "-m", "benchmarks.support"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("zero-copy") > 4
    assert f"<!-- support -->\n{run.stdout}<!-- /support -->" in README
