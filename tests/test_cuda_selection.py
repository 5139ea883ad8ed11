"""Which GPU is used and why not another, on stand-in devices: backends, drivers, forks, `info`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from cuda_standin import (
    calls,
    current_device,
    driver,
    environment,
    on_standin,
)

import gpuconst
from gpuconst.backends import select
from gpuconst.environment import BackendInfo

pytestmark = pytest.mark.needs("numba_cuda")


@on_standin()
def test_devices_are_selected_by_name() -> None:
    places = [select(name) for name in ("cuda", "cuda:0", "cuda:1")]
    assert [(place.backend, place.device, place.index) for place in places] == [
        ("numba", "cuda:0", 0),
        ("numba", "cuda:0", 0),
        ("numba", "cuda:1", 1),
    ]
    assert select(None).device == "cuda:0"
    assert select("cpu").backend == "numpy"


@on_standin()
def test_cuda_is_the_current_device() -> None:
    with current_device(1):
        assert select("cuda").device == "cuda:1"
        assert select(None).device == "cuda:1"
        assert gpuconst.full(3, 1, device="cuda").device == "cuda:1"
    assert select("cuda").device == "cuda:0"


@on_standin()
def test_a_device_out_of_range_names_those_there_are() -> None:
    with pytest.raises(gpuconst.DeviceUnavailableError, match=r"no device cuda:2; there are cuda:0 \(Stand-in 0\)"):
        gpuconst.full(3, 1, device="cuda:2")


@on_standin(GPUCONST_BACKEND="")
def test_a_backend_that_cannot_be_used_is_passed_over() -> None:
    array = gpuconst.full(3, 1.0, device="cuda")
    assert (array.backend, array.device) == ("numba", "cuda:0")
    cupy, numba = gpuconst.info().backends[:2]
    assert numba.why_not is None
    assert "CuPy cannot use CUDA" in str(cupy.why_not)


@on_standin(GPUCONST_BACKEND="cupy")
def test_a_backend_that_was_named_is_not_passed_over() -> None:
    with pytest.raises(gpuconst.DeviceUnavailableError, match="CuPy cannot use CUDA"):
        gpuconst.full(3, 1.0)


def check_unusable(reason: str, backend: str | None = None, *, warned: bool = True) -> None:
    """Check that a named device is refused for a reason, of one backend or all, and the default one is the CPU.

    Whoever did not name a device is warned, if a GPU was to be expected.
    """
    for device in ("cuda", "cuda:1"):
        with pytest.raises(gpuconst.DeviceUnavailableError, match=re.escape(reason)):
            gpuconst.full(3, 1.0, device=device)
    os.environ.pop("GPUCONST_BACKEND", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        array = gpuconst.zeros(3)
    assert (array.device, array.backend) == ("cpu", "numpy")
    assert [(warning.category, warning.filename) for warning in caught] == [(RuntimeWarning, __file__)] * warned
    assert all("although there is an NVIDIA driver" in str(warning.message) for warning in caught)
    assert all(reason in str(warning.message) for warning in caught)
    *others, numpy = gpuconst.info().backends
    assert all(reason in str(row.why_not) for row in others if backend in (None, row.name))
    assert numpy.why_not is None


@on_standin(STANDIN_DEVICES=1)
def test_one_device_is_enough_for_a_backend() -> None:
    assert gpuconst.info().backends[1] == BackendInfo("numba", "cuda", version("numba-cuda"), None)


@on_standin(STANDIN_DEVICES=0)
def test_no_device() -> None:
    check_unusable("the driver finds no device", warned=False)


@on_standin(STANDIN_DEVICES=0)
def test_a_card_in_mig_mode_without_an_instance_is_no_device() -> None:
    check_unusable("or the card is in MIG mode and has no instance", warned=False)


@on_standin(CUDA_VISIBLE_DEVICES="MIG-c7384736-a75d-5afc-978f-d2f1294409fd")
def test_a_mig_instance_that_is_gone() -> None:
    check_unusable("CUDA_VISIBLE_DEVICES='MIG-c7384736", warned=False)


@on_standin(CUDA_VISIBLE_DEVICES="")
def test_no_visible_device() -> None:
    check_unusable("CUDA_VISIBLE_DEVICES=''", warned=False)


@on_standin(STANDIN_VERSION=11080)
def test_a_driver_that_is_too_old() -> None:
    check_unusable("the driver supports CUDA 11.8, needed is 12.0")


@on_standin(STANDIN_VERSION=11080, CALLER="nameless", GPUCONST_BACKEND="")
def test_code_that_belongs_to_no_module_is_warned_too() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec("full(3, 1.0)", {"full": gpuconst.full})
    (warning,) = caught
    assert warning.filename == "<string>"


@on_standin(STANDIN_VERSION=12040)
def test_a_driver_of_before_the_compiler() -> None:
    check_unusable("the driver of CUDA 12.4; pip install 'gpuconst[cuda12]', or update the driver", backend="numba")


@on_standin(GPUCONST_BACKEND="numba", STANDIN_RETAIN=2)
def test_a_card_without_room_for_a_context() -> None:
    with pytest.raises(gpuconst.OutOfMemoryError, match="cuda:0 has no room for a CUDA context; another process"):
        gpuconst.full(3, 1.0)


@on_standin(GPUCONST_BACKEND="numba", STANDIN_RETAIN=46)
def test_a_card_that_another_process_has_for_itself() -> None:
    with pytest.raises(gpuconst.DeviceUnavailableError, match="cuda:0 gives this process no CUDA context"):
        gpuconst.full(3, 1.0)


@on_standin(STANDIN_INIT=803)
def test_a_driver_of_another_version() -> None:
    check_unusable("of different versions")


@on_standin(STANDIN_INIT=804)
def test_a_driver_without_forward_compatibility() -> None:
    check_unusable("forward compatibility")


@on_standin(STANDIN_INIT=999)
def test_a_driver_that_cannot_start() -> None:
    check_unusable("nvidia-uvm")


@on_standin(STANDIN_INIT=46)
def test_a_driver_with_an_error_of_its_own() -> None:
    check_unusable("CUDA error 46")


@pytest.mark.parametrize(("raised", "reason"), [(signal.SIGSEGV, "exit status -11"), (signal.SIGSTOP, "no answer")])
def test_a_driver_that_crashes_or_hangs(raised: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(STANDIN_SIGNAL=int(raised)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gpuconst.environment.PATIENCE", 3)
    found = gpuconst.info()
    assert f"the probe of the GPU failed: {reason}" in found.default
    *others, numpy = found.backends
    assert all(reason in str(row.why_not) for row in others)
    assert numpy.why_not is None


def test_a_probe_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ml_dtypes.py").write_text("raise ImportError('built for another NumPy')")
    monkeypatch.syspath_prepend(tmp_path)
    assert gpuconst.info().default == "none: the probe of the GPU failed: ImportError: built for another NumPy"


def test_what_is_printed_as_python_starts_and_ends_is_no_part_of_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit; print('welcome'); atexit.register(print, 'bye')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpuconst.info().backends[-1].why_not is None


@on_standin(STANDIN_CAPABILITY=70)
def test_a_card_that_the_compiler_has_dropped() -> None:
    check_unusable("Numba cannot compile for sm_70 (GPU compute capability 7.0 is not supported", backend="numba")


def test_no_driver(tmp_path: Path, run_python: Callable[..., str]) -> None:
    (tmp_path / "libcuda.so.1").touch()
    code = """
    import test_cuda_selection
    test_cuda_selection.check_unusable("no NVIDIA driver", warned=False)
    """
    run_python(code, LD_LIBRARY_PATH=str(tmp_path), PYTHONPATH=str(Path(__file__).parent))


def test_a_driver_without_what_is_called(tmp_path: Path, run_python: Callable[..., str]) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    subprocess.run([compiler, "-shared", "-o", tmp_path / "libcuda.so.1", "-xc", os.devnull], check=True)
    code = """
    import test_cuda_selection
    test_cuda_selection.check_unusable("undefined symbol: cuCtxPushCurrent_v2", warned=False)
    """
    run_python(code, LD_LIBRARY_PATH=str(tmp_path), PYTHONPATH=str(Path(__file__).parent))


@on_standin(MISSING="numba-cuda", GPUCONST_BACKEND="")
def test_missing_packages() -> None:
    import sys

    sys.modules["numba_cuda"] = None  # type: ignore[assignment]
    sys.modules["cupy"] = None  # type: ignore[assignment]
    with pytest.raises(gpuconst.DeviceUnavailableError) as raised:
        gpuconst.full(3, 1.0, device="cuda")
    assert "cupy: CuPy is not installed; pip install" in str(raised.value)
    assert "numba: numba-cuda is not installed; pip install" in str(raised.value)
    assert gpuconst.full(3, 1.0).device == "cpu"
    assert not calls()  # a driver that has been called is of no use to a forked child


@on_standin(MISSING="cuda-core", GPUCONST_BACKEND="numba")
def test_a_release_that_is_too_old() -> None:
    import importlib.metadata

    version = importlib.metadata.version
    importlib.metadata.version = lambda distribution_name: (
        "1.1.4" if distribution_name == "cuda-core" else version(distribution_name)
    )
    with pytest.raises(gpuconst.DeviceUnavailableError, match=r"cuda-core is 1\.1\.4, needed is 1\.2; pip install"):
        gpuconst.full(3, 1.0, device="cuda")


@on_standin(MISSING="cuda-core candidate", GPUCONST_BACKEND="numba")
def test_a_release_candidate_is_not_too_old() -> None:
    import importlib.metadata

    version = importlib.metadata.version
    importlib.metadata.version = lambda distribution_name: (
        "1.3rc1" if distribution_name == "cuda-core" else version(distribution_name)
    )
    assert gpuconst.full(3, 1.0, device="cuda").backend == "numba"


@on_standin(FORKS="yes")
def test_forked_after_cuda_was_initialised() -> None:
    assert gpuconst.full(3, 1.0, device="cuda").device == "cuda:0"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with pytest.raises(gpuconst.DeviceUnavailableError, match="forked after CUDA was initialised"):
                gpuconst.full(3, 1.0, device="cuda")
            os.environ.pop("GPUCONST_BACKEND", None)
            with warnings.catch_warnings(action="error"):
                found = gpuconst.info()
            assert found.default == "cpu (numpy)"
            assert gpuconst.full(3, 1.0).device == "cpu"
            assert all("forked after CUDA was initialised" in str(row.why_not) for row in found.backends[:2])
            os.write(writer, b"as it should")
        finally:
            os._exit(0)
    os.close(writer)  # or a child that says nothing would be waited for
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"as it should"
    assert gpuconst.full(3, 1.0, device="cuda").device == "cuda:0"


@on_standin(INITIALISED_BY="others")
def test_forked_after_others_initialised_cuda() -> None:
    assert driver().cuInit(0) == 0
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = gpuconst.info()
            assert all("forked after CUDA was initialised" in str(row.why_not) for row in found.backends[:2])
            os.write(writer, b"as it should")
        finally:
            os._exit(0)
    os.close(writer)  # or a child that says nothing would be waited for
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"as it should"


def test_cpu_work_calls_no_driver(run_python: Callable[..., str]) -> None:
    settings = environment()
    code = """
    import gpuconst, numpy
    array = gpuconst.full((1000, 3), 1.5, device="cpu")
    gpuconst.fill(array, 2)
    buffers = [numpy.empty(1000), numpy.empty(7)]
    gpuconst.fill_many(buffers, 3)
    gpuconst.plan_fill(buffers, 4).fill()
    numpy.from_dlpack(array), array.to_numpy(), gpuconst.shares_memory(array, array)
    """
    run_python(code, **settings)
    assert not Path(settings["STANDIN_LOG"]).exists()
    run_python("import gpuconst; gpuconst.zeros(3, device='cuda')", **settings)
    assert Path(settings["STANDIN_LOG"]).exists()


@on_standin(INFO="yes", STANDIN_MEMORY=1_500_000_000)  # 1.4 GiB
def test_info_leaves_this_process_free_to_fork() -> None:
    table = str(gpuconst.info())
    assert "NVIDIA driver: CUDA 13.0" in table
    assert "cuda:1: Stand-in 1, compute capability 9.0, 1 GiB" in table
    assert not any(line.startswith("cuDevicePrimaryCtxRetain") for line in calls())
    child = os.fork()
    if not child:
        os._exit(0 if gpuconst.full(3, 1.0, device="cuda").device == "cuda:0" else 1)
    assert os.waitpid(child, 0)[1] == 0
