"""The Keras initializers on each backend of Keras, each in a process of its own.

A process imports one backend and runs all of the cases asked for, files of `keras_cases`, with pytest;
here each case is a test, with the outcome that it had there. Several devices are another process: a
backend counts its devices once.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

CASES = Path(__file__).with_name("keras_cases")


@dataclass(frozen=True)
class Process:
    """What one process runs."""

    backend: str
    files: list[str]
    environment: dict[str, str] = field(default_factory=dict)


EVERYWHERE = ["values", "layers", "models", "objects", "saving"]
PROCESSES = {
    "tensorflow": Process("tensorflow", [*EVERYWHERE, "sharing", "training", "on_tensorflow"]),
    "jax": Process("jax", [*EVERYWHERE, "sharing", "training", "on_jax"]),
    "torch": Process("torch", [*EVERYWHERE, "sharing", "training", "on_torch"]),
    "numpy": Process("numpy", EVERYWHERE),
    "openvino": Process("openvino", EVERYWHERE),
    "tensorflow on 2 devices": Process("tensorflow", ["mirrored"]),
    "jax on 8 devices": Process("jax", ["distribution"], {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}),
}

IGNORED = [
    # JAX without jax_enable_x64 says so each time that it takes a 32-bit type for a 64-bit one.
    "ignore:Explicitly requested dtype:UserWarning",
    # Keras' Variable has an __array__ from before NumPy 2.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
]


def _cases(file: str) -> list[str]:
    tree = ast.parse((CASES / f"{file}.py").read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [f"{file}.py::{name}" for name in names]


ALL = [(name, case) for name, process in PROCESSES.items() for file in process.files for case in _cases(file)]

# By the name of a case with its parameters: whether it passed, failed or was skipped, and what was said of it.
Outcomes = dict[str, tuple[str, str]]


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Outcomes]]:
    asked: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == "test_keras":
            process, case = (str(item.callspec.params[name]) for name in ("process", "case"))
            asked.setdefault(process, []).append(case)
    with ThreadPoolExecutor(2) as pool:
        running = {
            name: pool.submit(_run, PROCESSES[name], cases, tmp_path_factory.mktemp("keras") / "report.xml")
            for name, cases in asked.items()
            if importlib.util.find_spec(PROCESSES[name].backend) is not None
        }
        yield lambda name: running[name].result()


def _run(process: Process, cases: list[str], report: Path) -> Outcomes:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, *(f"-W{line}" for line in IGNORED), *(str(CASES / case) for case in cases)],
        env={
            **os.environ,
            **process.environment,
            "KERAS_BACKEND": process.backend,
            "CUDA_VISIBLE_DEVICES": "-1",
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        cwd=CASES.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert report.exists(), f"the process ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name')}"
        found[name] = next(((child.tag, _text(child)) for child in case if child.tag in _TAGS), ("passed", ""))
    return found


_TAGS = ("failure", "error", "skipped")


def _text(element: ElementTree.Element) -> str:
    return element.get("message", "") if element.tag == "skipped" else element.text or ""


@pytest.mark.needs("keras")
@pytest.mark.parametrize(("process", "case"), ALL, ids=[f"{process}-{case}" for process, case in ALL])
def test_keras(process: str, case: str, outcomes: Callable[[str], Outcomes]) -> None:
    if importlib.util.find_spec(PROCESSES[process].backend) is None:
        pytest.skip(f"{PROCESSES[process].backend} is not installed")
    found = outcomes(process)
    mine = [outcome for name, outcome in found.items() if name.partition("[")[0] == case]
    assert mine, f"{case} did not run: {found}"
    failures = [text for tag, text in mine if tag in ("failure", "error")]
    if failures:
        pytest.fail(f"{len(failures)} of {len(mine)} failed\n\n" + "\n\n".join(failures[:3]), pytrace=False)
    if all(tag == "skipped" for tag, _ in mine):
        pytest.skip(mine[0][1])
