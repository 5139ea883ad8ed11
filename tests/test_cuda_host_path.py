"""The CUDA path without a GPU, on stand-in devices: selection, memory, launches, streams and errors.

The Numba backend runs on them whole; CuPy, whose runtime asks a driver for more, is refused here, and
so shows how a backend is passed over. In `test_cupy_host_path` it gets another runtime.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_standin import alive, calls, current_context, driver, environment, on_standin

import gpuconst
from gpuconst.backends import select
from gpuconst.kernels import runs
from gpuconst.kernels.runs import BLOCK, CHUNK

pytestmark = pytest.mark.needs("numba_cuda")

MIB = 1 << 20


class Foreign:
    """Somebody's CUDA memory, known by its CUDA Array Interface: a part of a gpuconst array."""

    def __init__(self, array: gpuconst.Array, offset: int = 0, **interface: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (array.data_ptr() + offset, False),
            "typestr": array.dtype.str,
            **interface,
        }


def new_stream(device: int = 0) -> int:
    """Return the handle of a new stream."""
    handle = ctypes.c_void_p()
    with current_device(device):
        assert driver().cuStreamCreateWithPriority(ctypes.byref(handle), 1, 0) == 0
    assert handle.value
    return handle.value


@contextmanager
def current_device(device: int) -> Iterator[None]:
    """Make a device the thread's current one, by its primary context."""
    context = ctypes.c_void_p()
    driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    driver().cuCtxPushCurrent_v2(context)
    try:
        yield
    finally:
        driver().cuCtxPopCurrent_v2(ctypes.byref(context))


def launches() -> list[str]:
    """Return kernel and grid of each launch."""
    return [" ".join(line.split()[1:3]) for line in calls("launch")]


# Which devices there are, and why not.


@on_standin()
def test_devices_are_selected_by_name() -> None:
    places = [select(name) for name in ("cuda", "cuda:0", "cuda:1")]
    assert [(place.backend, place.device, place.ordinal) for place in places] == [
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


def check_unusable(reason: str, backend: str | None = None) -> None:
    """Check that a named device is refused for a reason, of one backend or all, and the default one is the CPU."""
    for device in ("cuda", "cuda:1"):
        with pytest.raises(gpuconst.DeviceUnavailableError, match=re.escape(reason)):
            gpuconst.full(3, 1.0, device=device)
    os.environ.pop("GPUCONST_BACKEND", None)
    array = gpuconst.full(3, 1.0)
    assert (array.device, array.backend) == ("cpu", "numpy")
    *others, numpy = gpuconst.info().backends
    assert all(reason in str(row.why_not) for row in others if backend in (None, row.name))
    assert numpy.why_not is None


@on_standin(STANDIN_DEVICES=0)
def test_no_device() -> None:
    check_unusable("the driver finds no device")


@on_standin(STANDIN_DEVICES=0)
def test_a_card_in_mig_mode_without_an_instance_is_no_device() -> None:
    check_unusable("or the card is in MIG mode and has no instance")


@on_standin(CUDA_VISIBLE_DEVICES="MIG-c7384736-a75d-5afc-978f-d2f1294409fd")
def test_a_mig_instance_that_is_gone() -> None:
    check_unusable("CUDA_VISIBLE_DEVICES='MIG-c7384736")


@on_standin(CUDA_VISIBLE_DEVICES="")
def test_no_visible_device() -> None:
    check_unusable("CUDA_VISIBLE_DEVICES=''")


@on_standin(STANDIN_VERSION=11080)
def test_a_driver_that_is_too_old() -> None:
    check_unusable("the driver supports CUDA 11.8, needed is 12.0")


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


@on_standin(STANDIN_CAPABILITY=70)
def test_a_card_that_the_compiler_has_dropped() -> None:
    check_unusable("Numba cannot compile for sm_70 (GPU compute capability 7.0 is not supported", backend="numba")


def test_no_driver(tmp_path: Path, run_python: Callable[..., str]) -> None:
    (tmp_path / "libcuda.so.1").touch()
    code = """
    import test_cuda_host_path
    test_cuda_host_path.check_unusable("no NVIDIA driver")
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
            assert gpuconst.full(3, 1.0).device == "cpu"
            found = gpuconst.info()
            assert found.default == "cpu (numpy)"
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


@on_standin(INFO="yes")
def test_info_leaves_this_process_free_to_fork() -> None:
    assert "cuda:1: Stand-in 1, compute capability 9.0, 1 GiB" in str(gpuconst.info())
    assert not any(line.startswith("cuDevicePrimaryCtxRetain") for line in calls())
    child = os.fork()
    if not child:
        os._exit(0 if gpuconst.full(3, 1.0, device="cuda").device == "cuda:0" else 1)
    assert os.waitpid(child, 0)[1] == 0


# What is filled, and with which launches.


@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "float32", "complex64", "complex128"])
@on_standin()
def test_full(dtype: str) -> None:
    for shape in [(), (1,), (5, 7), (4099,), (3, 5, 1031)]:
        array = gpuconst.full(shape, 1, dtype=dtype, device="cuda")
        np.testing.assert_array_equal(array.to_numpy(), np.full(shape, 1, dtype))
        assert array.data_ptr() % 256 == 0


@on_standin()
def test_grid_covers_the_blocks() -> None:
    for nbytes in (1, BLOCK, BLOCK + 1, 5 * BLOCK):
        gpuconst.full(nbytes, 1, dtype="uint8", device="cuda:1")
    assert calls("launch") == [f"launch fill_run grid={n} block=256 stream=0x1 device=1" for n in (1, 1, 2, 5)]


@on_standin()
def test_nothing_is_launched_for_size_0() -> None:
    array = gpuconst.full((3, 0), 1.0, device="cuda")
    gpuconst.fill(array, 2.0)
    gpuconst.fill_many([array, array], 2.0)
    assert array.to_numpy().shape == (3, 0)
    assert not launches()


@on_standin()
def test_fill_of_foreign_memory() -> None:
    array = gpuconst.zeros(5000, dtype="int32", device="cuda:1")
    expected = array.to_numpy()
    gpuconst.fill(Foreign(array, 4, shape=(4000,)), 1)
    expected[1:4001] = 1
    gpuconst.fill(Foreign(array, 8, shape=(4, 300), strides=(4000, 4)), 2)
    np.lib.stride_tricks.as_strided(expected[2:], (4, 300), (4000, 4))[...] = 2
    gpuconst.fill(Foreign(array, 40, shape=(3, 4, 5), strides=(400, 100, 8)), 3)
    np.lib.stride_tricks.as_strided(expected[10:], (3, 4, 5), (400, 100, 8))[...] = 3
    gpuconst.fill(Foreign(array, 19996, shape=(10,), strides=(-12,)), 4)
    expected[4999 : 4999 - 30 : -3] = 4
    np.testing.assert_array_equal(array.to_numpy(), expected)
    kernels = [launch.split()[0] for launch in launches()]
    assert kernels == ["fill_run", "fill_run", "fill_rows", "fill_strided32", "fill_strided32"]


@on_standin()
def test_fill_many_is_one_launch_per_device() -> None:
    rng = np.random.default_rng(3)
    dtypes = ["uint8", "float16", "float32", "int64", "complex128"]
    arrays = [
        gpuconst.zeros(int(rng.integers(0, 3000)), dtype=dtypes[k % 5], device=f"cuda:{k % 2}") for k in range(100)
    ]
    before = len(calls("launch"))
    gpuconst.fill_many(arrays, range(1, 101))
    for value, array in enumerate(arrays, 1):
        np.testing.assert_array_equal(array.to_numpy(), np.full(array.shape, value, array.dtype))
    filled = launches()[before:]
    chunks = [sum(-(-array.nbytes // CHUNK) for array in arrays[k::2]) for k in (0, 1)]
    assert filled == [f"fill_runs grid={-(-n // 8)}" for n in chunks]


@on_standin()
def test_a_plan_uploads_its_table_once() -> None:
    arrays = [gpuconst.zeros(n, device="cuda") for n in (10, 2000, 30000)]
    plan = gpuconst.plan_fill(arrays, [1.0, 2.0, 3.0])
    uploads = calls("cuMemcpyAsync")
    for _ in range(3):
        gpuconst.fill_many(arrays, 0.0)
        uploads_of_fill_many = calls("cuMemcpyAsync")[len(uploads) :]
        plan.fill()
        assert calls("cuMemcpyAsync")[len(uploads) :] == uploads_of_fill_many
        assert [float(array.to_numpy()[-1]) for array in arrays] == [1.0, 2.0, 3.0]
        uploads = [*uploads, *uploads_of_fill_many]


# Streams.


def between(start: str, *names: str) -> list[str]:
    """Return the calls of some functions after the last one that starts with `start`."""
    lines = calls()
    last = max(k for k, line in enumerate(lines) if line.startswith(start))
    return [line for line in lines[last:] if line.split()[0] in names]


@on_standin()
def test_full_on_a_stream() -> None:
    stream = new_stream(1)
    array = gpuconst.full(10, 1.0, device="cuda:1", stream=stream)
    assert calls("launch") == [f"launch fill_run grid=1 block=256 stream={stream:#x} device=1"]
    assert calls("cuMemAllocFromPoolAsync") == [f"cuMemAllocFromPoolAsync nbytes=40 stream={stream:#x}"]
    assert array.__cuda_array_interface__["stream"] == stream
    del array
    assert calls("cuMemFreeAsync") == [f"cuMemFreeAsync stream={stream:#x}"]


@on_standin()
def test_a_stream_is_taken_from_anything_that_has_one() -> None:
    from cuda.core import Device

    handle = new_stream()

    class Speaks:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, handle

    with current_device(0):
        Device(0).set_current()
        stream = Device(0).create_stream(Speaks())
    for given in (handle, Speaks(), stream):
        gpuconst.full(10, 1.0, device="cuda", stream=given)
    assert [line.split()[4] for line in calls("launch")] == [f"stream={handle:#x}"] * 3


@on_standin()
def test_a_consumer_waits_for_the_producer() -> None:
    producer, consumer = new_stream(), new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=producer)
    array.__dlpack__(stream=consumer, max_version=(1, 1))
    record, wait = between("launch", "cuEventRecord", "cuStreamWaitEvent")
    event = record.split()[1]
    assert record == f"cuEventRecord {event} stream={producer:#x}"
    assert wait == f"cuStreamWaitEvent stream={consumer:#x} {event}"
    assert not alive("e")


@pytest.mark.parametrize("consumer", ["the producer", -1])
@on_standin()
def test_no_event_where_there_is_nothing_to_wait_for(consumer: Any) -> None:
    producer = new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=producer)
    array.__dlpack__(stream=producer if consumer == "the producer" else consumer)
    assert not calls("cuEventRecord", "cuStreamWaitEvent")


@on_standin()
def test_memory_is_given_back_after_its_consumers_are_done() -> None:
    producer, first, second = new_stream(), new_stream(), new_stream()
    array = gpuconst.full(1000, 1.0, device="cuda", stream=producer)
    capsules = [array.__dlpack__(stream=stream, max_version=(1, 1)) for stream in (first, second, first, producer)]
    before = len(calls())
    del array
    assert [line for line in calls()[before:] if "Free" in line] == []
    del capsules
    gc.collect()
    ended = [line.split() for line in calls()[before:]]
    recorded = [line for line in ended if line[0] == "cuEventRecord"]
    waited = [line for line in ended if line[0] == "cuStreamWaitEvent"]
    assert len(recorded) == len(waited) == 2  # each consumer once, the producer never
    names = [line[0] for line in ended]
    assert names.index("cuMemFreeAsync") > max(n for n, name in enumerate(names) if name == "cuStreamWaitEvent")


@on_standin()
def test_an_array_keeps_its_stream_and_nothing_else_does() -> None:
    class Stream:
        def __init__(self) -> None:
            self.handle = new_stream()

        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, self.handle

    stream = Stream()
    noticed = weakref.ref(stream)
    array = gpuconst.full(1000, 1.0, device="cuda", stream=stream)
    capsule = array.__dlpack__(stream=-1, max_version=(1, 1))
    del stream, array
    gc.collect()
    assert noticed() is not None
    del capsule
    gc.collect()
    assert noticed() is None


@on_standin()
def test_filling_on_another_stream_waits_for_the_first() -> None:
    first, second = new_stream(), new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=first)
    gpuconst.fill(array, 2.0, stream=second)
    record, wait, launch = between("launch fill_run grid=1 block=256 stream=" + hex(first), *FENCES)[1:]
    assert record.endswith(f"stream={first:#x}")
    assert wait.startswith(f"cuStreamWaitEvent stream={second:#x}")
    assert f"stream={second:#x}" in launch
    assert array.__cuda_array_interface__["stream"] == second


@pytest.mark.parametrize("use", ["fill_many", "plan"])
@on_standin()
def test_arrays_are_filled_on_the_stream_that_they_name(use: str) -> None:
    streams = [new_stream(), new_stream()]
    array = gpuconst.zeros(100, device="cuda")
    parts = [Foreign(array, 40 * n, shape=(10,), stream=stream) for n, stream in enumerate(streams)]
    before = len(calls("launch", "cuStreamWaitEvent"))
    if use == "fill_many":
        gpuconst.fill_many(parts, 1.0)
    else:
        gpuconst.plan_fill(parts, 1.0).fill()
    first, second = (f"stream={stream:#x}" for stream in streams)
    wait, launch, waits = calls("launch", "cuStreamWaitEvent")[before:]
    assert wait.startswith(f"cuStreamWaitEvent {first} ")
    assert f" {first} " in launch
    assert waits.startswith(f"cuStreamWaitEvent {second} ")


@on_standin()
def test_a_stream_that_is_asked_for_waits_for_those_that_arrays_name() -> None:
    named, asked = new_stream(), new_stream()
    array = gpuconst.zeros(100, device="cuda")
    parts = [Foreign(array, 40 * n, shape=(10,), stream=named) for n in range(2)]
    plan = gpuconst.plan_fill(parts, 1.0)
    before = len(calls(*FENCES))
    plan.fill(stream=asked)
    record, wait, launch = calls(*FENCES)[before:]
    assert record.endswith(f"stream={named:#x}")
    assert wait.startswith(f"cuStreamWaitEvent stream={asked:#x}")
    assert f"stream={asked:#x}" in launch


FENCES = ("cuEventRecord", "cuStreamWaitEvent", "launch", "cuMemcpyAsync", "cuStreamSynchronize")


@pytest.mark.parametrize("use", ["export", "fill", "fill_many", "plan"])
@on_standin()
def test_memory_is_given_back_after_the_streams_that_use_it(use: str) -> None:
    producer, consumer = new_stream(), new_stream()
    arrays = [gpuconst.full(10, 1.0, device="cuda", stream=producer)]
    if use == "export":
        arrays = [arrays.pop().__dlpack__(stream=consumer, max_version=(1, 1))]
    elif use == "fill":
        gpuconst.fill(arrays[0], 2.0, stream=consumer)
    elif use == "fill_many":
        gpuconst.fill_many(arrays, 2.0, stream=consumer)
    else:
        gpuconst.plan_fill(arrays, 2.0).fill(stream=consumer)
    names = ("cuEventRecord", "cuStreamWaitEvent", "cuMemFreeAsync")
    before = calls(*names)
    arrays.clear()
    record, wait, free = calls(*names)[len(before) :]
    event = record.split()[1]
    assert record == f"cuEventRecord {event} stream={consumer:#x}"
    assert wait == f"cuStreamWaitEvent stream={producer:#x} {event}"
    assert free == f"cuMemFreeAsync stream={producer:#x}"


@on_standin()
def test_memory_is_given_back_although_a_stream_that_used_it_is_gone() -> None:
    producer, consumer = new_stream(), new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=producer)
    gpuconst.fill(array, 2.0, stream=consumer)
    driver().cuStreamDestroy_v2(ctypes.c_void_p(consumer))
    del array
    assert not alive("m")
    assert not alive("e")
    assert current_context() == 0


@on_standin()
def test_to_numpy_copies_in_stream_order_and_waits() -> None:
    stream = new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=stream)
    array.to_numpy()
    _, copy, wait = between("launch", *FENCES)
    assert copy == f"cuMemcpyAsync nbytes=40 stream={stream:#x}"
    assert wait == f"cuStreamSynchronize stream={stream:#x}"


@on_standin()
def test_a_table_is_freed_after_the_fill_that_reads_it() -> None:
    arrays = [gpuconst.zeros(n, device="cuda") for n in (10, 20)]
    before = len(calls())
    gpuconst.fill_many(arrays, 1.0)
    names = [line.split()[0] for line in calls()[before:]]
    ordered = [
        name for name in names if name in ("cuMemAllocFromPoolAsync", "cuMemcpyAsync", "launch", "cuMemFreeAsync")
    ]
    assert ordered == ["cuMemAllocFromPoolAsync", "cuMemcpyAsync", "launch", "cuMemFreeAsync"]


@on_standin()
def test_a_stream_of_another_device_is_refused() -> None:
    stream = new_stream(1)

    class Other:
        device_index = 1

        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, stream

    with pytest.raises(ValueError, match="is a stream of cuda:1"):
        gpuconst.full(10, 1.0, device="cuda:0", stream=Other())
    assert not launches()


@contextmanager
def captured(stream: int) -> Iterator[None]:
    """Capture the work of a stream, and check that nothing spoils it."""
    driver().standin_capture(ctypes.c_void_p(stream))
    try:
        yield
    finally:
        assert not driver().standin_capture(None)


@on_standin()
def test_only_what_is_prepared_can_be_captured() -> None:
    stream = new_stream()
    arrays = [gpuconst.zeros(n, device="cuda", stream=stream) for n in (10, 20, 3000)]
    plan = gpuconst.plan_fill(arrays, 1.0)
    prepared = calls("cuMemAllocFromPoolAsync", "cuMemcpyAsync", "launch")
    with captured(stream):
        with pytest.raises(RuntimeError, match="graph is being captured"):
            gpuconst.full(10, 1.0, device="cuda", stream=stream)
        with pytest.raises(RuntimeError, match="plan_fill"):
            gpuconst.fill_many(arrays, 1.0, stream=stream)
        assert calls("cuMemAllocFromPoolAsync", "cuMemcpyAsync", "launch") == prepared
        gpuconst.fill(arrays[0], 3.0, stream=stream)
        gpuconst.fill(Foreign(arrays[2], shape=(7, 128), strides=(1600, 4)), 4.0, stream=stream)
        gpuconst.plan_fill(arrays[:1], 5.0).fill(stream=stream)
        plan.fill(stream=stream)
    work = calls("cuMemAllocFromPoolAsync", "cuMemcpyAsync", "launch")[len(prepared) :]
    assert [line.split()[:2] for line in work] == [
        ["launch", "fill_run"],
        ["launch", "fill_rows"],
        ["launch", "fill_run"],
        ["launch", "fill_runs"],
    ]


@on_standin()
def test_what_is_done_beside_a_capture_does_not_spoil_it() -> None:
    arrays = [gpuconst.zeros(n, device="cuda") for n in (10, 20)]
    with captured(new_stream()):
        gpuconst.fill_many(arrays, 1.0)
        assert [array.to_numpy().max() for array in arrays] == [1.0, 1.0]
        gpuconst.plan_fill(arrays, 2.0).fill()
        made = gpuconst.full_many({"a": (3, 1.0, None), "b": (5, 2.0, None)}, device="cuda")
        assert [array.to_numpy().max() for array in (*arrays, *made.values())] == [2.0, 2.0, 1.0, 2.0]


@on_standin()
def test_a_plan_makes_nobody_wait_before_it_is_gone() -> None:
    first, second = new_stream(), new_stream()
    arrays = [gpuconst.zeros(n, device="cuda", stream=first) for n in (10, 20)]
    plan = gpuconst.plan_fill([Foreign(array, shape=array.shape) for array in arrays], 1.0)
    before = calls("cuStreamWaitEvent")
    for _ in range(3):
        plan.fill(stream=second)
    assert calls("cuStreamWaitEvent") == before
    del plan
    gc.collect()
    (wait,) = calls("cuStreamWaitEvent")[len(before) :]
    assert wait.startswith("cuStreamWaitEvent stream=")


@on_standin(CAPTURE="first")
def test_capture_may_be_the_first_use() -> None:
    stream = new_stream()
    with captured(stream), pytest.raises(RuntimeError, match="graph is being captured"):
        gpuconst.full(10, 1.0, device="cuda", stream=stream)


@on_standin(CAPTURE="kernels")
def test_kernels_are_loaded_while_a_graph_is_captured() -> None:
    stream = new_stream()
    array = gpuconst.full((64, 64), 1.0, device="cuda:0", stream=stream)  # with the one kernel that is loaded then
    plan = gpuconst.plan_fill([Foreign(array, shape=(10,)), Foreign(array, 80, shape=(5,), strides=(12,))], 3.0)
    with captured(stream):
        gpuconst.fill(Foreign(array, shape=(5,), strides=(8,)), 2.0, stream=stream)
        plan.fill(stream=stream)
    assert [launch.split()[0] for launch in launches()[1:]] == ["fill_strided32", "fill_run", "fill_strided32"]


@pytest.mark.parametrize("use", ["fill", "plan"])
@on_standin()
def test_a_captured_fill_does_not_wait_for_what_is_not_captured(use: str) -> None:
    stream = new_stream()
    arrays = [gpuconst.zeros(n, device="cuda") for n in (10, 20)]
    plan = gpuconst.plan_fill(arrays, 1.0)
    with captured(stream):
        if use == "fill":
            gpuconst.fill(arrays[0], 3.0, stream=stream)
        else:
            plan.fill(stream=stream)
    assert f"stream={stream:#x}" in calls("launch")[-1]
    gpuconst.fill(arrays[0], 2.0, stream=new_stream())
    assert (arrays[0].to_numpy() == 2.0).all()


# Errors, and what is left behind.


@on_standin(STANDIN_MEMORY=MIB)
def test_out_of_memory() -> None:
    kept = gpuconst.ones(MIB // 8, device="cuda:0")
    with pytest.raises(gpuconst.OutOfMemoryError, match=rf"cuda:0 \(Stand-in 0.* {MIB // 2 + 4} bytes"):
        gpuconst.ones(MIB // 8 + 1, device="cuda:0")
    assert gpuconst.ones(MIB // 8 + 1, device="cuda:1").device == "cuda:1"
    assert (gpuconst.ones(MIB // 8, device="cuda:0").to_numpy() == 1).all()
    assert (kept.to_numpy() == 1).all()
    assert list(alive("m")) == [kept.data_ptr()]
    assert current_context() == 0


@on_standin(STANDIN_MEMORY=MIB)
def test_out_of_memory_for_a_table_writes_nothing() -> None:
    arrays = [gpuconst.zeros(MIB // 8, device="cuda:0") for _ in range(2)]
    before = launches()
    with pytest.raises(gpuconst.OutOfMemoryError):
        gpuconst.fill_many(arrays, 1.0)
    assert launches() == before
    del arrays[1]
    gpuconst.fill_many(arrays, 2.0)
    assert (arrays[0].to_numpy() == 2).all()


@on_standin()
def test_nothing_is_left_behind() -> None:
    gpuconst.zeros(1, device="cuda")  # makes the pool, and loads a kernel
    before = {kind: len(alive(kind)) for kind in "mep"}
    streams = [new_stream(), new_stream()]
    for _ in range(20):
        arrays = [gpuconst.full(n, 1.0, device="cuda", stream=streams[n % 2]) for n in range(1, 10)]
        gpuconst.fill_many(arrays, 2.0)
        plan = gpuconst.plan_fill(arrays, 3.0)
        plan.fill(stream=streams[1])
        arrays[0].__dlpack__(stream=streams[1])
        arrays[0].to_numpy()
    del arrays, plan
    gc.collect()
    assert {kind: len(alive(kind)) for kind in "mep"} == before


@on_standin(POOL="first")
def test_the_pool_keeps_no_more_than_it_says() -> None:
    from gpuconst.kernels import numba_cuda

    gpuconst.zeros(1, device="cuda")
    assert f"value={numba_cuda.RELEASE_THRESHOLD}" in calls("cuMemPoolSetAttribute")[0]


@on_standin(POOL="first")
def test_the_pool_is_not_the_process_wide_one() -> None:
    gpuconst.zeros(1, device="cuda:1")
    assert calls("cuMemPoolCreate") == ["cuMemPoolCreate device=1"]
    assert not calls("cuDeviceGetDefaultMemPool")


@pytest.mark.parametrize("current", [None, 0, 1])
@on_standin()
def test_the_current_context_is_left_alone(current: int | None) -> None:
    def work() -> None:
        expected = current_context()
        stream = new_stream()
        steps: list[Callable[[], object]] = [
            lambda: arrays.append(gpuconst.full(1000, 1.0, device="cuda:0", stream=stream)),
            lambda: arrays.append(gpuconst.full(1000, 1.0, device="cuda:0")),
            lambda: gpuconst.fill(arrays[0], 2.0),
            lambda: gpuconst.fill_many(arrays, 3.0),
            lambda: gpuconst.plan_fill(arrays, 4.0).fill(stream=stream),
            lambda: arrays[0].__dlpack__(stream=1),
            lambda: arrays[0].__dlpack__(dl_device=(1, 0)),
            lambda: arrays[0].to_numpy(),
            lambda: gpuconst.shares_memory(Foreign(arrays[0], shape=(10,)), arrays[0]),
            lambda: select("cuda"),
            arrays.clear,
        ]
        for step in steps:
            step()
            assert current_context() == expected, step
        with pytest.raises(gpuconst.OutOfMemoryError):
            gpuconst.full(1 << 40, 1.0, device="cuda:0")
        assert current_context() == expected

    arrays: list[Any] = []
    if current is None:
        assert current_context() == 0
        work()
    else:
        with current_device(current):
            work()


@on_standin()
def test_threads() -> None:
    failed: list[BaseException] = []

    def work(value: int) -> None:
        try:
            for n in range(1, 30):
                array = gpuconst.full(100 * n, value, device=f"cuda:{value % 2}")
                gpuconst.fill_many([array, Foreign(array, shape=(n,))], [value, value + 1])
                assert (array.to_numpy()[n:] == value).all()
                assert (array.to_numpy()[:n] == value + 1).all()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=[value]) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@on_standin()
def test_memory_that_is_not_a_devices_is_refused() -> None:
    array = gpuconst.zeros(10, device="cuda")
    host = np.zeros(10)
    interface = Foreign(array, shape=(10,))
    interface.__cuda_array_interface__["data"] = (host.ctypes.data, False)
    with pytest.raises(ValueError, match="unknown to the driver"):
        gpuconst.fill(interface, 1.0)
    interface.__cuda_array_interface__["data"] = (array.data_ptr(), True)
    with pytest.raises(ValueError, match="read-only"):
        gpuconst.fill(interface, 1.0)
    assert len(launches()) == 1


@on_standin()
def test_a_fault_is_an_error() -> None:
    backend = select("cuda")
    array = gpuconst.zeros(10, device="cuda")
    beyond = runs.Region(array.data_ptr() + MIB, (10,), (4,), b"abcd")
    with pytest.raises(Exception, match="CUDA_ERROR"):
        backend.module.fill(beyond, 0, 0)
    assert current_context() == 0
