"""The Keras initializers on each backend of Keras, each in a process of its own.

A process imports one backend and runs all of the cases asked for, files of `keras_cases`, with pytest;
here each case is a test, with the outcome that it had there.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

CASES = Path(__file__).with_name("keras_cases")
EVERYWHERE = ["values", "layers", "objects", "saving"]
FILES = {
    "tensorflow": [*EVERYWHERE, "sharing", "on_tensorflow"],
    "jax": [*EVERYWHERE, "sharing", "on_jax"],
    "torch": [*EVERYWHERE, "sharing", "on_torch"],
    "numpy": EVERYWHERE,
    "openvino": EVERYWHERE,
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


ALL = [(backend, case) for backend, files in FILES.items() for file in files for case in _cases(file)]

# By the name of a case with its parameters: whether it passed, failed or was skipped, and what was said of it.
Outcomes = dict[str, tuple[str, str]]


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Outcomes]]:
    asked: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == "test_keras":
            backend, case = (str(item.callspec.params[name]) for name in ("backend", "case"))
            asked.setdefault(backend, []).append(case)
    with ThreadPoolExecutor(2) as pool:
        running = {
            backend: pool.submit(_run, backend, cases, tmp_path_factory.mktemp(backend) / "report.xml")
            for backend, cases in asked.items()
            if importlib.util.find_spec(backend) is not None
        }
        yield lambda backend: running[backend].result()


def _run(backend: str, cases: list[str], report: Path) -> Outcomes:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, *(f"-W{line}" for line in IGNORED), *(str(CASES / case) for case in cases)],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
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


@pytest.mark.parametrize(("backend", "case"), ALL, ids=[f"{backend}-{case}" for backend, case in ALL])
def test_keras(backend: str, case: str, outcomes: Callable[[str], Outcomes]) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    found = outcomes(backend)
    mine = [outcome for name, outcome in found.items() if name.partition("[")[0] == case]
    assert mine, f"{case} did not run: {found}"
    failures = [text for tag, text in mine if tag in ("failure", "error")]
    if failures:
        pytest.fail(f"{len(failures)} of {len(mine)} failed\n\n" + "\n\n".join(failures[:3]), pytrace=False)
    if all(tag == "skipped" for tag, _ in mine):
        pytest.skip(mine[0][1])
