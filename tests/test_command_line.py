"""`gpuconst info` and `gpuconst demo`, as a user runs them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from installed import each

import gpuconst
from gpuconst.__main__ import main
from gpuconst.backends import BACKENDS
from gpuconst.environment import BackendInfo, Info
from gpuconst.kernels.cuda_driver import driver

WITHOUT = """
import runpy, sys
sys.path.insert(0, {tests!r})
from without import hide
hide(*{names!r})
sys.argv = ["gpuconst", *{arguments!r}]
runpy.run_module("gpuconst", run_name="__main__")
"""

needs_no_gpu = pytest.mark.skipif(driver().why_not is None, reason="there is a GPU")


def _python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # -P: the installed package, not the folder of the same name in the working directory.
    return subprocess.run(
        [sys.executable, "-P", *command],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _gpuconst(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return _python("-m", "gpuconst", *arguments, **environment)


def _gpuconst_without(names: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parent)
    return _python("-c", WITHOUT.format(tests=tests, names=names, arguments=arguments))


def _failed_with_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_the_command_is_the_module() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="gpuconst")
    assert command.load() is main
    script = Path(sys.executable).with_name("gpuconst")
    if not script.exists():
        pytest.skip("the command is not beside the interpreter")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "info" in done.stdout
    assert "demo" in done.stdout


def test_the_version() -> None:
    done = _gpuconst("--version")
    assert (done.returncode, done.stdout) == (0, f"gpuconst {importlib.metadata.version('gpuconst')}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error_to_speak_of(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-P", "-m", "gpuconst", "info"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}  # whether it is found in print or when Python exits
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_info_is_a_table() -> None:
    done = _gpuconst("info")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"gpuconst {importlib.metadata.version('gpuconst')}, Python ")
    for name, row in BACKENDS.items():
        assert re.search(rf"^  {name} +{row.device} +\S+ +(usable|not usable: \S.*)$", done.stdout, re.MULTILINE)
    assert re.search(r"^  numpy +cpu +[\d.]+ +usable$", done.stdout, re.MULTILINE)
    assert f"numpy {importlib.metadata.version('numpy')}" in lines[-1]


def test_the_table_of_info() -> None:
    backends = (
        BackendInfo("cupy", "cuda", None, "CuPy is not installed"),
        BackendInfo("numpy", "cpu", "2.4.0", None),
    )
    found = Info("1.0", "3.13.1", "Linux x86_64", "cpu (numpy)", None, (), backends, {"torch": "2.9", "jax": "0.8"})
    assert str(found).splitlines() == [
        "gpuconst 1.0, Python 3.13.1, Linux x86_64",
        "default device: cpu (numpy)",
        "NVIDIA driver: none",
        "backends, in the order they are tried:",
        "  cupy   cuda  -          not usable: CuPy is not installed",
        "  numpy  cpu   2.4.0      usable",
        "frameworks: torch 2.9, jax 0.8",
    ]
    found = dataclasses.replace(found, driver="13.0", devices=("H100", "H200"))
    assert str(found).splitlines()[2:5] == ["NVIDIA driver: CUDA 13.0", "  cuda:0: H100", "  cuda:1: H200"]


def test_info_names_the_frameworks_that_are_installed() -> None:
    frameworks = gpuconst.info().frameworks
    assert frameworks["numpy"] == np.__version__
    assert frameworks == {name: importlib.metadata.version(name) for name in frameworks}


def test_info_finds_the_version_of_cupy_under_each_of_its_names() -> None:
    cupy = pytest.importorskip("cupy")
    assert gpuconst.info().backends[0].version == cupy.__version__


def test_info_as_json_says_the_same() -> None:
    found = json.loads(_gpuconst("info", "--json").stdout)
    expected = json.loads(json.dumps(gpuconst.info().asdict()))
    assert found.keys() == expected.keys()
    for key in ("version", "python", "system", "frameworks"):
        assert found[key] == expected[key]
    assert [row["name"] for row in found["backends"]] == list(BACKENDS)
    for row in found["backends"]:
        assert row.keys() == {"name", "device", "version", "why_not"}


@needs_no_gpu
def test_info_gives_the_reason_for_each_unusable_backend() -> None:
    for row in gpuconst.info().backends:
        assert row.why_not is None if row.device == "cpu" else "no NVIDIA driver" in str(row.why_not)
    assert gpuconst.info().default == "cpu (numpy)"
    assert gpuconst.info().driver is None


def test_info_says_what_is_not_installed() -> None:
    done = _gpuconst_without(["keras", "cupy", "numba"], "info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == importlib.metadata.version("gpuconst")


@needs_no_gpu
def test_info_with_a_backend_that_cannot_be_used_or_is_none() -> None:
    done = _gpuconst("info", GPUCONST_BACKEND="cupy")
    assert done.returncode == 0
    assert "default device: none: GPUCONST_BACKEND=cupy cannot be used" in done.stdout
    done = _gpuconst("info", GPUCONST_BACKEND="opencl")
    assert done.returncode == 0
    assert "default device: none: GPUCONST_BACKEND='opencl' names no backend; there are 'cupy'" in done.stdout


@pytest.mark.needs("keras")
@pytest.mark.parametrize("backend", each("tensorflow", "jax", "torch"))
def test_demo(backend: str) -> None:
    asked = ["demo", "--backend", backend, "--device", "cpu"]
    done = _gpuconst(*asked, KERAS_BACKEND="theano")  # which the option overrides
    assert done.returncode == 0, done.stderr
    assert "Total params" in done.stdout
    assert "7,114" in done.stdout  # 100 x 64 + 64 + 64 x 10 + 10
    (prediction,) = re.findall(r"^prediction: \[(.*)\]$", done.stdout, re.MULTILINE)
    assert [float(number) for number in prediction.split()] == pytest.approx([0.1] * 10)
    heading, *weights = done.stdout.split("weights of ")[1].splitlines()
    assert heading == f"Keras' {backend} backend:"
    assert len(weights) == 4
    for line, shape in zip(weights, [(100, 64), (64,), (64, 10), (10,)], strict=True):
        assert line.endswith(f"{shape}: shares the memory that gpuconst's numpy backend on cpu filled")


@pytest.mark.needs("keras", "jax")
def test_demo_takes_the_backend_of_the_environment_and_a_value() -> None:
    done = _gpuconst("demo", "--value", "0.25", KERAS_BACKEND="jax")
    assert done.returncode == 0, done.stderr
    assert "weights of Keras' jax backend:" in done.stdout
    assert done.stdout.count("shares the memory that gpuconst's") == 4


@pytest.mark.needs("keras", "jax")
def test_demo_takes_the_first_backend_that_is_installed() -> None:
    done = _gpuconst_without(["tensorflow"], "demo")
    assert done.returncode == 0, done.stderr
    assert "weights of Keras' jax backend:" in done.stdout


def test_a_backend_that_is_none() -> None:
    done = _gpuconst("demo", "--backend", "theano")
    assert done.returncode == 2
    assert "invalid choice: 'theano' (choose from" in done.stderr
    assert all(name in done.stderr.splitlines()[-1] for name in ("tensorflow", "jax", "torch"))


@pytest.mark.needs("keras")
def test_a_keras_backend_that_is_none() -> None:
    line = _failed_with_one_line(_gpuconst("demo", KERAS_BACKEND="theano"))
    assert "theano" in line
    assert "gpuconst[" not in line  # Keras' own words: there is no such extra


@needs_no_gpu
def test_a_gpu_that_is_not_there() -> None:
    line = _failed_with_one_line(_gpuconst("demo", "--backend", "jax", "--device", "cuda"))
    assert line.startswith("gpuconst demo: device 'cuda' cannot be used: ")
    assert "no NVIDIA driver" in line
    assert "the CPU works everywhere" in line


def test_a_device_that_is_none() -> None:
    line = _failed_with_one_line(_gpuconst("demo", "--backend", "jax", "--device", "tpu"))
    assert line == "gpuconst demo: unknown device 'tpu'; devices are 'cpu', 'cuda' and 'cuda:N'"


@pytest.mark.needs("keras", "jax")
def test_a_value_that_is_none() -> None:
    line = _failed_with_one_line(_gpuconst("demo", "--backend", "jax", "--value", "1e40"))
    assert line.startswith("gpuconst demo: 1e+40 does not fit float32")


def test_no_keras() -> None:
    line = _failed_with_one_line(_gpuconst_without(["keras"], "demo"))
    assert line.startswith("gpuconst demo: Keras is not installed")
    assert "pip install 'gpuconst[keras]'" in line
    assert "gpuconst.full" in line


def test_no_keras_backend() -> None:
    line = _failed_with_one_line(_gpuconst_without(["tensorflow", "jax", "torch"], "demo"))
    assert line.startswith(
        "gpuconst demo: Keras needs a backend, and none is installed; pip install 'gpuconst[keras,jax]'"
    )
    line = _failed_with_one_line(_gpuconst_without(["torch"], "demo", "--backend", "torch"))
    assert line == "gpuconst demo: Keras' backend torch is not installed; pip install 'gpuconst[torch]'"


def test_no_command() -> None:
    done = _gpuconst()
    assert done.returncode == 2
    assert "usage: gpuconst" in done.stderr
