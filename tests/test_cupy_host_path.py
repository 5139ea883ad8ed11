"""The CuPy backend on stand-in devices: CuPy's own arrays, pool, streams, compiler and launches, on the stand-in's
runtime and driver.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import test_cuda_host_path
import test_cuda_selection
import test_cuda_streams
from cuda_standin import MIB, Foreign, alive, calls, driver, launches, new_stream, on_standin

import gpuconst
from gpuconst.dtypes import DTYPES

cupy = pytest.importorskip("cupy", reason="cupy is not installed")

on_cupy = on_standin(GPUCONST_BACKEND="cupy", STANDIN_RUNTIME=1)

_WITH_NUMBA = (test_cuda_host_path, test_cuda_selection, test_cuda_streams)
#: Tests of the Numba backend that hold of CuPy's as they are.
SHARED = [
    "test_cuda_is_the_current_device",
    "test_a_device_out_of_range_names_those_there_are",
    "test_nothing_is_launched_for_size_0",
    "test_words_of_any_bits_reach_the_kernels",
    "test_fill_of_foreign_memory",
    "test_fill_many_is_one_launch_per_device",
    "test_a_plan_uploads_its_table_once",
    "test_a_stream_is_taken_from_anything_that_has_one",
    "test_a_consumer_waits_for_the_producer",
    "test_an_array_keeps_its_stream_and_nothing_else_does",
    "test_filling_on_another_stream_waits_for_the_first",
    "test_a_stream_that_is_asked_for_waits_for_those_that_arrays_name",
    "test_to_numpy_copies_in_stream_order_and_waits",
    "test_a_stream_of_another_device_is_refused",
    "test_what_is_done_beside_a_capture_does_not_spoil_it",
    "test_only_what_is_prepared_can_be_captured",
    "test_capture_may_be_the_first_use",
    "test_kernels_are_loaded_while_a_graph_is_captured",
    "test_threads",
    "test_memory_that_is_not_a_devices_is_refused",
]


@pytest.mark.parametrize("name", SHARED)
@on_cupy
def test_as_with_numba(name: str) -> None:
    (test,) = [vars(file)[name] for file in _WITH_NUMBA if name in vars(file)]
    test.__wrapped__()


@pytest.mark.parametrize("dtype", DTYPES)
@on_cupy
def test_full(dtype: str) -> None:
    for shape in [(), (0,), (1,), (5, 7), (4099,), (3, 5, 1031)]:
        array = gpuconst.full(shape, 1, dtype=dtype, device="cuda:1")
        assert (array.backend, array.device, array.data_ptr() % 256) == ("cupy", "cuda:1", 0)
        expected = gpuconst.full(shape, 1, dtype=dtype, device="cpu").to_numpy()
        assert array.to_numpy().dtype == expected.dtype
        assert array.to_numpy().tobytes() == expected.tobytes()


@on_cupy
def test_memory_is_of_cupys_pool() -> None:
    stream = new_stream()
    array = gpuconst.full(MIB, 1.0, device="cuda", stream=stream)
    assert calls("cuMemAlloc_v2") == [f"cuMemAlloc_v2 nbytes={4 * MIB}"]
    assert calls("launch")[0].split()[1:] == ["fill_run", "grid=256", "block=256", f"stream={stream:#x}", "device=0"]
    pointer = array.data_ptr()
    del array
    assert gpuconst.full(MIB, 2.0, device="cuda", stream=stream).data_ptr() == pointer
    assert gpuconst.full(MIB, 2.0, device="cuda").data_ptr() != pointer  # another stream's is another's memory
    assert len(calls("cuMemAlloc_v2")) == 2
    assert not calls("cuMemFree_v2")


@pytest.mark.parametrize("use", ["export", "fill", "fill_many", "plan"])
@on_cupy
def test_memory_is_given_back_after_the_streams_that_use_it(use: str) -> None:
    producer, consumer = new_stream(), new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=producer)
    pointer = array.data_ptr()
    kept = [test_cuda_streams.used_on(consumer, array, use)]
    del array
    made = [gpuconst.full(10, 1.0, device="cuda", stream=producer) for _ in range(3)]
    assert pointer not in [array.data_ptr() for array in made]
    before = calls("cuEventRecord", "cuStreamWaitEvent")
    kept.clear()
    record, wait = calls("cuEventRecord", "cuStreamWaitEvent")[len(before) :]
    event = record.split()[1]
    assert record == f"cuEventRecord {event} stream={consumer:#x}"
    assert wait == f"cuStreamWaitEvent stream={producer:#x} {event}"
    assert gpuconst.full(10, 1.0, device="cuda", stream=producer).data_ptr() == pointer
    del made


@pytest.mark.parametrize("dtype", [name for name in DTYPES if not name.startswith("float8")])
@on_cupy
def test_to_cupy_shares_the_memory(dtype: str) -> None:
    array = gpuconst.full((3, 5), 1, dtype=dtype, device="cuda:1")
    shared = array.to_cupy()
    assert (shared.data.ptr, shared.shape, shared.dtype) == (array.data_ptr(), (3, 5), array.dtype)
    assert shared.device.id == 1
    assert gpuconst.shares_memory(shared, array)


@on_cupy
def test_cupy_lacks_float8() -> None:
    array = gpuconst.full(3, 1, dtype="float8_e5m2", device="cuda")
    with pytest.raises(TypeError, match="CuPy has no dtype float8_e5m2; fill with 'uint8' and the raw bits"):
        array.to_cupy()


@on_cupy
def test_cupy_reads_the_cuda_array_interface() -> None:
    array = gpuconst.full((3, 5), 1.5, device="cuda")
    assert cupy.asarray(array).data.ptr == array.data_ptr()


@on_cupy
def test_arrays_carved_from_one_block_are_cupys_too() -> None:
    made = gpuconst.full_many({str(n): ((n,), n, "bfloat16") for n in range(20)}, device="cuda")
    assert len(launches()) == 1
    assert [array.to_numpy().tolist() for array in made.values()] == [[n] * n for n in range(20)]
    assert all(array.data_ptr() % 256 == 0 for array in made.values())
    last = made.pop("19").to_cupy()
    made.clear()
    gc.collect()
    gpuconst.full_many({str(n): ((n,), 0, "bfloat16") for n in range(20)}, device="cuda")
    assert last.size == 19
    assert not calls("cuMemFree_v2")


@on_cupy
def test_a_cupy_array_is_filled_on_cupys_current_stream() -> None:
    x = cupy.ndarray((1000,), np.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        gpuconst.fill(x, 1.5)
    gpuconst.fill(x[::-3], 5.0)
    assert [line.split()[4] for line in calls("launch")] == [f"stream={stream.ptr:#x}", "stream=(nil)"]
    expected = np.full(1000, 1.5, np.float32)
    expected[::-3] = 5.0
    memory = (ctypes.c_char * x.nbytes).from_address(x.data.ptr)  # a stand-in's is the host's
    np.testing.assert_array_equal(np.frombuffer(memory, np.float32), expected)


@on_cupy
def test_a_stream_that_is_asked_for_does_not_wait_for_cupys_current_one() -> None:
    xs = [cupy.ndarray((n,), np.float32) for n in (10, 20)]
    asked = new_stream()
    with cupy.cuda.Stream(non_blocking=True):
        gpuconst.fill(xs[0], 1.5, stream=asked)
        gpuconst.fill_many(xs, 1.5, stream=asked)
    assert [line.split()[4] for line in calls("launch")] == [f"stream={asked:#x}"] * 2
    assert not calls("cuStreamWaitEvent")


@on_cupy
def test_a_stream_of_which_cupy_does_not_know_the_device_is_taken() -> None:
    x, stream = cupy.ndarray((10,), np.float32), cupy.cuda.ExternalStream(new_stream())
    assert stream.device_id == -1
    gpuconst.fill(x, 1.5, stream=stream)
    assert f" stream={stream.ptr:#x} " in calls("launch")[-1]


@on_cupy
def test_nothing_is_done_outside_of_the_graph_that_cupy_captures() -> None:
    arrays = [gpuconst.zeros(n, device="cuda") for n in (10, 20)]
    plan = gpuconst.plan_fill(arrays, 1.0)
    before = launches()
    with cupy.cuda.Stream(non_blocking=True) as current, test_cuda_streams.captured(current.ptr):
        for work in (
            lambda: gpuconst.full(3, 1.0, device="cuda"),
            lambda: gpuconst.full_many({"a": (3, 1.0, None)}, device="cuda"),
            lambda: gpuconst.fill(arrays[0], 1.0),
            lambda: gpuconst.fill(Foreign(arrays[0], shape=(5,), strides=(8,)), 1.0),
            lambda: gpuconst.fill_many(arrays, 1.0),
            plan.fill,
        ):
            with pytest.raises(RuntimeError, match=r"runs now, .*; pass stream=cupy\.cuda\.get_current_stream\(0\)$"):
                work()
        assert launches() == before
        gpuconst.fill(arrays[0], 1.0, stream=cupy.cuda.get_current_stream())
        plan.fill(stream=cupy.cuda.get_current_stream())
    assert [line.split()[0] for line in launches()[len(before) :]] == ["fill_run", "fill_runs"]


@on_cupy
def test_a_capture_may_close_the_legacy_stream_which_is_cupys_current_one() -> None:
    stream = new_stream(blocking=True)
    array = gpuconst.zeros(10, device="cuda", stream=stream)
    with test_cuda_streams.captured(stream):
        gpuconst.fill(array, 1.0)
    assert f" stream={stream:#x} " in calls("launch")[-1]


@on_cupy
def test_arrays_elsewhere_do_not_choose_the_stream() -> None:
    theirs, ours = cupy.ndarray((3,), np.float32), gpuconst.zeros(3, device="cuda:1")
    with cupy.cuda.Device(1), cupy.cuda.Stream(non_blocking=True):
        gpuconst.fill_many([theirs, ours], 1.0)
    filled = {line.partition("stream=")[2] for line in calls("launch")[-2:]}
    assert filled == {"(nil) device=0", "(nil) device=1"}


@on_cupy
def test_a_plan_that_is_refused_on_a_gpu_fills_nothing_on_the_cpu() -> None:
    on_cpu, on_gpu = np.zeros(3), gpuconst.zeros(3, device="cuda")
    plan = gpuconst.plan_fill([on_cpu, on_gpu], 1.0)
    with cupy.cuda.Stream(non_blocking=True) as current, test_cuda_streams.captured(current.ptr):
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            plan.fill()
        assert not on_cpu.any()
    plan.fill()
    assert on_cpu.all()
    assert on_gpu.to_numpy().all()


@on_cupy
def test_cupys_device_and_stream_are_left_alone() -> None:
    stream = new_stream()
    with cupy.cuda.Device(1), cupy.cuda.Stream() as current:
        gpuconst.full(1000, 1.0, device="cuda:0", stream=stream).to_numpy()
        gpuconst.full_many({"a": (3, 1.0, None), "b": (5, 2.0, None)}, device="cuda:0")
        assert cupy.cuda.Device().id == 1
        assert cupy.cuda.get_current_stream() == current
        assert gpuconst.full(3, 1.0, device="cuda").device == "cuda:1"
    assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null


@on_cupy
def test_other_peoples_streams_are_not_destroyed() -> None:
    streams = [new_stream() for _ in range(100)]
    for stream in streams:
        gpuconst.full(10, 1.0, device="cuda", stream=stream)
    gc.collect()
    assert set(streams) <= set(alive("s"))


@on_cupy
def test_cupys_current_stream_outlives_what_it_has_to_wait_for() -> None:
    """CuPy destroys a stream with its object; memory that it used is given back after it."""
    xs = [cupy.ndarray((n,), np.float32) for n in (10, 20)]
    plan = gpuconst.plan_fill(xs, 1.0)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        plan.fill()
    handle = stream.ptr
    del stream
    gc.collect()
    assert handle in alive("s")
    del plan
    gc.collect()
    assert handle not in alive("s")
    assert calls("cuEventRecord")[-1].endswith(f"stream={handle:#x}")


@pytest.mark.parametrize("index", [0, 1])
@on_cupy
def test_a_stream_on_which_cupy_took_an_array_outlives_its_memory(index: int) -> None:
    array = gpuconst.full(10, 1.0, device=f"cuda:{index}")
    with cupy.cuda.Device(index), cupy.cuda.Stream(non_blocking=True) as stream:
        handle = stream.ptr
        gpuconst.fill(array, 2.0, stream=handle)  # a number keeps nothing alive
        shared = array.to_cupy()
        gpuconst.fill(array, 3.0, stream=handle)
    del stream
    gc.collect()
    assert handle in alive("s")
    del array, shared
    gc.collect()
    assert handle not in alive("s")
    assert calls("cuEventRecord")[-1].endswith(f"stream={handle:#x}")


@on_cupy
def test_memory_whose_consumer_is_captured_is_given_back_afterwards() -> None:
    consumer = new_stream()
    array = gpuconst.full(10, 1.0, device="cuda:0")
    gpuconst.fill(array, 2.0, stream=consumer)
    pointer = array.data_ptr()
    with test_cuda_streams.captured(consumer):
        del array
        gc.collect()
        assert gpuconst.full(10, 1.0, device="cuda:0").data_ptr() != pointer
    assert gpuconst.full(10, 1.0, device="cuda:0").data_ptr() == pointer


@on_cupy
def test_a_capture_on_another_stream_is_not_spoiled_where_the_pool_grows() -> None:
    with test_cuda_streams.captured(new_stream()):
        array = gpuconst.full(10, 1.0, device="cuda", stream=new_stream())
    assert calls("cuMemAlloc_v2")
    assert (array.to_numpy() == 1.0).all()


@on_cupy
def test_memory_of_a_per_thread_default_stream_waits_for_its_consumers_on_any_thread() -> None:
    """CuPy gives it to the thread that it was of again, and only the legacy stream is ordered with that thread's."""
    consumer = new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=2)
    gpuconst.fill(array, 2.0, stream=consumer)
    before = calls("cuEventRecord", "cuStreamWaitEvent")
    kept = [array]
    del array
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    record, wait = calls("cuEventRecord", "cuStreamWaitEvent")[len(before) :]
    assert record.endswith(f"stream={consumer:#x}")
    assert wait.startswith("cuStreamWaitEvent stream=(nil)")


@contextmanager
def stream_ordered(look: Callable[[Any], None]) -> Iterator[None]:
    """Have CuPy allocate memory that is looked at as it is freed; like CuPy's own, it refers weakly to its stream."""

    class Ordered(cupy.cuda.memory.BaseMemory):  # type: ignore[misc, name-defined]
        def __init__(self, nbytes: int) -> None:
            self.pooled = cupy.get_default_memory_pool().malloc(nbytes)
            self.ptr, self.size, self.device_id = self.pooled.ptr, nbytes, cupy.cuda.runtime.getDevice()
            self.stream = weakref.ref(cupy.cuda.get_current_stream())

        def __del__(self) -> None:
            look(self)

    with cupy.cuda.using_allocator(lambda nbytes: cupy.cuda.MemoryPointer(Ordered(nbytes), 0)):
        yield


@on_cupy
def test_memory_of_another_allocator_goes_back_on_a_stream_that_is_there() -> None:
    freed = []
    with stream_ordered(lambda memory: freed.append(memory.stream() is not None)):
        array = gpuconst.full(10, 1.0, device="cuda:0", stream=new_stream())
        for _ in range(100):
            gpuconst.full(10, 1.0, device="cuda:0", stream=new_stream())
    del array
    gc.collect()
    assert freed == [True] * 101


@on_cupy
def test_memory_of_another_allocator_goes_back_on_its_own_device() -> None:
    freed = []
    with stream_ordered(lambda memory: freed.append((memory.device_id, cupy.cuda.runtime.getDevice()))):
        arrays = [gpuconst.full(10, 1.0, device=f"cuda:{index}") for index in (0, 1)]
    del arrays
    gc.collect()
    assert sorted(freed) == [(0, 0), (1, 1)]
    assert cupy.cuda.runtime.getDevice() == 0


@on_cupy
def test_torchs_allocator_in_place_of_cupys_may_have_no_room() -> None:
    class OutOfMemoryError(RuntimeError):
        """Of torch."""

    def allocate(nbytes: int) -> Any:
        raise OutOfMemoryError("CUDA out of memory.")

    with cupy.cuda.using_allocator(allocate), pytest.raises(gpuconst.OutOfMemoryError, match="no room for 40 bytes"):
        gpuconst.full(10, 1.0, device="cuda:0")


@on_standin(GPUCONST_BACKEND="cupy", STANDIN_RUNTIME=1, STANDIN_MEMORY=4 * MIB)
def test_out_of_memory() -> None:
    kept = gpuconst.ones(MIB // 2, device="cuda:0")
    with pytest.raises(gpuconst.OutOfMemoryError, match=rf"cuda:0 \(Stand-in 0.* {4 * MIB} bytes"):
        gpuconst.ones(MIB, device="cuda:0")
    arrays = [gpuconst.zeros(MIB // 4, device="cuda:0") for _ in range(2)]
    before = launches()
    with pytest.raises(gpuconst.OutOfMemoryError):
        gpuconst.fill_many(arrays, 1.0)  # there is no room for the table
    assert launches() == before
    del arrays[1]
    gpuconst.fill_many([arrays[0], kept], 2.0)
    assert (kept.to_numpy() == 2.0).all()
    assert gpuconst.ones(MIB, device="cuda:1").device == "cuda:1"


@on_standin(GPUCONST_BACKEND="cupy", STANDIN_RUNTIME=1, STANDIN_CAPABILITY=70)
def test_a_card_that_the_compiler_has_dropped() -> None:
    with pytest.raises(gpuconst.DeviceUnavailableError, match=r"NVRTC .* has dropped compute capability 7\.0"):
        gpuconst.full(3, 1.0, device="cuda")


@on_cupy
def test_memory_is_given_back_although_a_stream_that_used_it_is_gone() -> None:
    producer, consumer = new_stream(), new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=producer)
    gpuconst.fill(array, 2.0, stream=consumer)
    pointer = array.data_ptr()
    assert driver().cuStreamDestroy_v2(ctypes.c_void_p(consumer)) == 0
    del array
    assert gpuconst.full(10, 1.0, device="cuda", stream=producer).data_ptr() == pointer
