"""The built package: what is in it, and that it works where the repository is out of sight."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: object, cwd: Path, **environment: object) -> str:
    variables: Mapping[str, str] = {**ENVIRONMENT, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel, built from a source distribution of a copy of the sources."""
    folder = tmp_path_factory.mktemp("build")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, sources)
    for name in ("gpuconst", "kernels", "tests"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    run("-m", "build", "--no-isolation", "--outdir", folder, sources, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Return the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel installed and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_the_source_distribution_has_what_is_built_and_no_tests(wheel: Path) -> None:
    (archive,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        tops = {path.split("/")[1] for path in sources.getnames() if "/" in path}
    assert tops >= {"CHANGELOG.md", "LICENSE", "README.md", "gpuconst", "kernels", "pyproject.toml"}
    assert "tests" not in tops


def test_gpuconst_is_the_only_top_level_name(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gpuconst"}


def test_every_module_is_in_the_wheel(names: set[str]) -> None:
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {
        *(f"gpuconst/{path.name}" for path in (ROOT / "gpuconst").glob("*.py")),
        *(f"gpuconst/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")),
    }
    assert "gpuconst/py.typed" in names


def test_sources_are_flat() -> None:
    """A folder below these would be missing from the wheel: only the two are listed as packages."""
    for room in ("gpuconst", "kernels"):
        assert {path.parent for path in (ROOT / room).rglob("*.py")} == {ROOT / room}


def test_only_numpy_and_ml_dtypes_are_required(wheel: Path, names: set[str]) -> None:
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        fields = Parser().parsestr(archive.read(metadata).decode())
    required = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.partition(">")[0].strip() for line in required) == ["ml_dtypes", "numpy"]
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = """
import gpuconst, gpuconst.kernels, numpy
x = gpuconst.full((3, 4), 0.1, dtype="bfloat16", device="cpu")
gpuconst.fill(x, 0.5)
print(gpuconst.__file__, gpuconst.kernels.__file__, x.to_numpy().sum(), sep="\\n")
"""
    package, kernels, total = run("-W", "error", "-c", code, cwd=tmp_path, PYTHONPATH=installed).splitlines()
    assert Path(package) == installed / "gpuconst" / "__init__.py"
    assert Path(kernels) == installed / "gpuconst" / "kernels" / "__init__.py"
    assert float(total) == 6


@pytest.mark.skipif(os.name != "posix", reason="pip puts commands elsewhere")
def test_the_installed_command_is_the_module(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "bin" / "gpuconst"), "--help"]
    variables = {**ENVIRONMENT, "PYTHONPATH": str(installed)}
    found = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == run("-m", "gpuconst", "--help", cwd=tmp_path, PYTHONPATH=installed)


def test_a_bare_checkout_says_how_to_install_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "gpuconst", tmp_path / "gpuconst")
    # -S: neither the installed package nor NumPy is there, as on a machine with Python alone.
    command = [sys.executable, "-S", "-c", "import gpuconst"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: gpuconst is not installed: this is its source folder; from the repository, run: pip install -e ."
    )
