"""`import gpuconst` costs what NumPy and ml_dtypes cost: no framework, no CUDA library, no driver."""

import importlib.metadata
import json
import types
from collections.abc import Callable

import pytest

import gpuconst

ALLOWED = {"numpy", "ml_dtypes", "gpuconst"}

# Prints what was loaded: the libraries asked of ctypes, and the installed packages.
REPORT = """
import ctypes, sys
libraries = []
class Recorded(ctypes.CDLL):
    def __init__(self, name, *arguments, **options):
        libraries.append(name)
        super().__init__(name, *arguments, **options)
ctypes.CDLL = Recorded
try:
    exec({code!r})
finally:
    import json, site, sysconfig
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
    print(json.dumps({{
        "modules": sorted({{
            name.partition(".")[0] for name, module in list(sys.modules.items())
            if (getattr(module, "__file__", None) or "").startswith(tuple(packages))
        }} | {{name for name in sys.modules if name == "gpuconst"}}),
        "libraries": [str(name) for name in libraries] + [name for name in ("libcuda", "libnvrtc") if name in maps],
    }}))
"""

CPU_WORK = """
import gpuconst, numpy
x = gpuconst.full((3, 4), 0.1, device="cpu")
y = x.to_numpy()
gpuconst.fill(y, 0.5)
gpuconst.fill(bytearray(5), 1)
gpuconst.fill_many([y, x], 0.5)
gpuconst.full_many({"a": ((3,), 1, "bfloat16")}, device="cpu")
gpuconst.shares_memory(x, y)
numpy.from_dlpack(x)
repr(x)
dir(gpuconst)
"""


def loaded(run_python: Callable[..., str], code: str) -> tuple[set[str], list[str]]:
    """Return the installed packages that code loads, beyond the ones that may be, and the CUDA libraries."""
    found = json.loads(run_python(REPORT.format(code=code)).splitlines()[-1])
    assert "gpuconst" in found["modules"]
    hidden = {name for name in found["modules"] if name.startswith(("_", "__editable"))}
    cuda = [name for name in found["libraries"] if "cuda" in name or "nv" in name]
    return set(found["modules"]) - ALLOWED - hidden, cuda


@pytest.mark.parametrize("code", ["import gpuconst", CPU_WORK], ids=["import", "work on the CPU"])
def test_nothing_heavy_is_loaded(code: str, run_python: Callable[..., str]) -> None:
    assert loaded(run_python, code) == (set(), [])


@pytest.mark.parametrize("name", ["torch", "tensorflow", "cupy", "logging"])
def test_a_framework_that_another_thread_is_importing_is_none_yet(name: str, run_python: Callable[..., str]) -> None:
    run_python(
        f"""
        import sys, types
        import numpy as np, gpuconst

        sys.modules[{name!r}] = types.ModuleType({name!r})  # as it is at first, with nothing in it
        x = np.zeros(3)
        gpuconst.fill(x, 1.0)
        gpuconst.fill_many([x, x], 2.0)
        plan = gpuconst.plan_fill([x], 3.0)
        plan.fill()
        assert plan.stale() == [] and gpuconst.shares_memory(x, x)
        assert x.tolist() == [3, 3, 3]
        made = gpuconst.full_many({{"a": (3, 1.0, float)}}, device="cpu")
        assert made["a"].dtype == gpuconst.full(3, 1.0, dtype=float, device="cpu").dtype == float
        """
    )


def test_nobody_is_told_where_nobody_can_listen(run_python: Callable[..., str]) -> None:
    run_python(
        "import numpy, ml_dtypes, sys; before = set(sys.modules)"
        + CPU_WORK
        + "assert 'logging' not in set(sys.modules) - before"
    )


@pytest.mark.parametrize("package", ["hypothesis", pytest.param("cuda.pathfinder", marks=pytest.mark.needs("cuda"))])
def test_the_check_sees_packages(package: str, run_python: Callable[..., str]) -> None:
    packages, _ = loaded(run_python, f"import gpuconst, {package}")
    assert package.partition(".")[0] in packages


def test_the_check_sees_the_driver(run_python: Callable[..., str]) -> None:
    code = "import gpuconst.kernels.cuda_driver; gpuconst.kernels.cuda_driver.driver()"
    _, libraries = loaded(run_python, code)
    assert libraries


@pytest.mark.needs("keras")
def test_every_public_name_is_there_and_listed_in_order() -> None:
    assert gpuconst.__all__ == sorted(gpuconst.__all__)
    assert len(set(gpuconst.__all__)) == len(gpuconst.__all__)
    public = {
        name
        for name, value in vars(gpuconst).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - set(gpuconst.__all__) <= {"TYPE_CHECKING"}
    for name in gpuconst.__all__:
        assert getattr(gpuconst, name).__doc__, name


KERAS_NAMES = {"Constant", "Ones", "Zeros", "keras"}


@pytest.mark.needs("keras")
def test_dir_lists_what_there_is_for_users(run_python: Callable[..., str]) -> None:
    names = run_python("import gpuconst; print(*dir(gpuconst))").split()
    shown = {name for name in names if not name.startswith("__")}
    assert shown == {*gpuconst.__all__, *KERAS_NAMES, "torch", "jax"}
    assert {"__doc__", "__version__"} <= set(names)
    assert names == sorted(names)


def test_without_keras_everything_that_is_listed_is_there(run_python: Callable[..., str]) -> None:
    code = """
        import sys
        sys.path.insert(0, "tests")
        import without
        without.hide("keras")
        import inspect, gpuconst, pydoc
        from gpuconst import *
        print(*(name for name, _ in inspect.getmembers(gpuconst)), callable(full))
        assert "fill_many" in pydoc.render_doc(gpuconst)
    """
    names = run_python(code).split()
    assert not KERAS_NAMES & set(names)
    assert {*gpuconst.__all__, "True"} <= set(names)


def test_all_of_it_is_imported_without_a_framework(run_python: Callable[..., str]) -> None:
    assert loaded(run_python, "from gpuconst import *") == (set(), [])


def test_the_version_is_that_of_the_installed_package() -> None:
    assert gpuconst.__version__ == importlib.metadata.version("gpuconst")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'gpuconst' has no attribute 'nothing'"):
        _ = gpuconst.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Constant", "Zeros", "Ones", "keras"])
def test_without_keras_its_names_say_what_to_install(name: str, run_python: Callable[..., str]) -> None:
    code = f"""
        import sys
        sys.modules["keras"] = None  # what an import of it finds is that there is none
        import gpuconst
        try:
            gpuconst.{name}
        except ImportError as error:
            print(error)
    """
    message = run_python(code)
    assert "pip install 'gpuconst[keras]'" in message
    assert "gpuconst.full" in message


@pytest.mark.needs("keras", "jax")
@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [("Constant", "jax", "No module named 'jax'"), ("jax", "jaxlib", "jax requires jaxlib to be installed")],
)
def test_what_a_framework_lacks_is_not_taken_for_the_framework(
    name: str, missing: str, message: str, run_python: Callable[..., str]
) -> None:
    code = f"""
        import sys
        sys.path.insert(0, "tests")
        import without
        without.hide("{missing}")
        import gpuconst
        try:
            gpuconst.{name}
        except ImportError as error:
            print(error)
    """
    assert run_python(code, KERAS_BACKEND="jax").startswith(message)


@pytest.mark.needs("keras")
def test_keras_names_are_those_of_the_adapter(run_python: Callable[..., str]) -> None:
    code = """
        import sys, gpuconst
        assert "keras" not in sys.modules
        print(all(getattr(gpuconst, name) is getattr(gpuconst.keras, name) for name in ("Constant", "Zeros", "Ones")))
    """
    assert run_python(code, KERAS_BACKEND="jax") == "True"
