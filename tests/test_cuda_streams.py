"""Streams, on stand-in devices: who waits for whom, when memory goes back to its pool, capture into graphs."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
from cuda_standin import (
    Foreign,
    alive,
    calls,
    current_context,
    current_device,
    driver,
    launches,
    new_stream,
    on_standin,
)
from lying_capsules import IS_COPIED, DLPackOnly

import gpuconst
from gpuconst.dlpack import read_capsule
from gpuconst.kernels import cuda_driver

pytestmark = pytest.mark.needs("numba_cuda")


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
def test_numbas_default_stream_is_a_null_pointer() -> None:
    class Default:
        handle = ctypes.c_void_p(0)

    array = gpuconst.full(10, 1.0, device="cuda", stream=Default())
    assert array.__cuda_array_interface__["stream"] == 1  # the legacy one


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
def test_no_event_where_one_stream_has_two_names() -> None:
    array = gpuconst.full(10, 1.0, device="cuda", stream=0)
    gpuconst.fill(array, 2.0, stream=1)
    array.__dlpack__(stream=1)
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

    class Older:
        def __init__(self) -> None:
            self.ptr = new_stream()

    for kind in (Stream, Older):
        stream = kind()
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
def test_a_consumer_waits_for_the_stream_that_filled_last(use: str) -> None:
    first, second, consumer = new_stream(), new_stream(), new_stream()
    arrays = [gpuconst.full(n, 1.0, device="cuda", stream=first) for n in (10, 20)]
    if use == "fill_many":
        gpuconst.fill_many(arrays, 2.0, stream=second)
    else:
        gpuconst.plan_fill(arrays, 2.0).fill(stream=second)
    for array in arrays:
        assert array.__cuda_array_interface__["stream"] == second
        array.__dlpack__(stream=consumer)
        record, wait = calls("cuEventRecord", "cuStreamWaitEvent")[-2:]
        assert record.endswith(f"stream={second:#x}")
        assert wait.startswith(f"cuStreamWaitEvent stream={consumer:#x}")


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


@pytest.mark.parametrize("use", ["fill_many", "plan"])
@on_standin()
def test_an_array_of_ours_is_filled_on_its_own_stream_which_waits_for_nothing(use: str) -> None:
    stream = new_stream()
    array = gpuconst.zeros(10, device="cuda", stream=stream)
    before = len(calls(*FENCES))
    if use == "fill_many":
        gpuconst.fill_many([array], 1.0)
    else:
        gpuconst.plan_fill([array], 1.0).fill()
    (launch,) = calls(*FENCES)[before:]
    assert f" stream={stream:#x} " in launch


class Both(DLPackOnly):
    """Speaks DLPack, which names no stream, and the CUDA Array Interface, which does."""

    @property
    def __cuda_array_interface__(self) -> Any:
        return self.array.__cuda_array_interface__


@on_standin()
def test_an_array_of_both_protocols_is_filled_on_the_stream_that_it_names() -> None:
    stream = new_stream()
    array = gpuconst.zeros(100, device="cuda", stream=stream)
    before = len(calls("launch"))
    gpuconst.fill(Both(array), 1.0)
    (launch,) = calls("launch")[before:]
    assert f" stream={stream:#x} " in launch


class Legacy(DLPackOnly):
    """An exporter of before DLPack 1.0, which notes the stream that it is told."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        self.stream = stream
        return self.array.__dlpack__(stream=stream)


@on_standin()
def test_an_exporter_of_before_dlpack_1_is_told_the_stream_too() -> None:
    x = Legacy(gpuconst.zeros(100, device="cuda"))
    gpuconst.fill(x, 1.0)
    assert x.stream == 1


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


def used_on(consumer: int, array: gpuconst.Array, use: str) -> Any:
    """Hand an array to a stream, and return what keeps its memory alive."""
    if use == "export":
        return array.__dlpack__(stream=consumer, max_version=(1, 1))
    if use == "fill":
        gpuconst.fill(array, 2.0, stream=consumer)
    elif use == "fill_many":
        gpuconst.fill_many([array], 2.0, stream=consumer)
    else:
        gpuconst.plan_fill([array], 2.0).fill(stream=consumer)
    return array


@pytest.mark.parametrize("use", ["export", "fill", "fill_many", "plan"])
@on_standin()
def test_memory_is_given_back_after_the_streams_that_use_it(use: str) -> None:
    producer, consumer = new_stream(), new_stream()
    kept = [used_on(consumer, gpuconst.full(10, 1.0, device="cuda", stream=producer), use)]
    names = ("cuEventRecord", "cuStreamWaitEvent", "cuMemFreeAsync")
    before = calls(*names)
    kept.clear()
    record, wait, free = calls(*names)[len(before) :]
    event = record.split()[1]
    assert record == f"cuEventRecord {event} stream={consumer:#x}"
    assert wait == f"cuStreamWaitEvent stream={producer:#x} {event}"
    assert free == f"cuMemFreeAsync stream={producer:#x}"


@pytest.mark.parametrize("use", ["fill_many", "plan"])
@on_standin()
def test_a_stream_serves_the_arrays_on_the_gpu_among_others_on_the_cpu(use: str) -> None:
    stream = new_stream()
    arrays = [gpuconst.zeros(10, device=device) for device in ("cpu", "cuda")]
    if use == "fill_many":
        gpuconst.fill_many(arrays, 1.0, stream=stream)
    else:
        gpuconst.plan_fill(arrays, 1.0).fill(stream=stream)
    assert f" stream={stream:#x} " in calls("launch")[-1]
    assert all((array.to_numpy() == 1.0).all() for array in arrays)


@on_standin()
def test_memory_is_given_back_although_a_stream_that_used_it_is_gone() -> None:
    producer, gone, consumer = (new_stream() for _ in range(3))
    array = gpuconst.full(10, 1.0, device="cuda", stream=producer)
    for stream in (gone, consumer):
        gpuconst.fill(array, 2.0, stream=stream)
    driver().cuStreamDestroy_v2(ctypes.c_void_p(gone))
    del array
    assert calls("cuEventRecord")[-1].endswith(f"stream={consumer:#x}")  # which is still waited for
    assert not alive("m")
    assert not alive("e")
    assert current_context() == 0


@on_standin()
def test_to_numpy_copies_in_stream_order_and_waits() -> None:
    stream = new_stream(1)
    array = gpuconst.full(10, 1.0, device="cuda:1", stream=stream)
    array.to_numpy()
    _, copy, wait = between("launch", *FENCES)
    assert copy == f"cuMemcpyAsync nbytes=40 stream={stream:#x}"
    assert wait == f"cuStreamSynchronize stream={stream:#x}"


@on_standin()
def test_a_copy_on_the_device_is_made_in_stream_order_and_its_consumer_waits() -> None:
    producer, consumer = new_stream(1), new_stream(1)
    array = gpuconst.full(10, 1.0, device="cuda:1", stream=producer)
    before = calls("cuMemAllocFromPoolAsync")
    capsule = array.__dlpack__(copy=True, stream=consumer, max_version=(1, 1))
    (allocated,) = calls("cuMemAllocFromPoolAsync")[len(before) :]
    copy, record, wait = between("cuMemcpyAsync", *FENCES)
    assert allocated == f"cuMemAllocFromPoolAsync nbytes=40 stream={producer:#x}"
    assert copy == f"cuMemcpyAsync nbytes=40 stream={producer:#x}"
    assert record.endswith(f" stream={producer:#x}")
    assert wait.startswith(f"cuStreamWaitEvent stream={consumer:#x} ")
    tensor, flags = read_capsule(capsule)
    assert (tensor.device_type, tensor.device_id, flags) == (*array.__dlpack_device__(), IS_COPIED)
    assert {tensor.data, array.data_ptr()} <= set(alive("m"))
    assert tensor.data != array.data_ptr()
    assert ctypes.string_at(tensor.data, array.nbytes) == array.to_numpy().tobytes()
    del array
    before = calls(*FENCES, "cuMemFreeAsync")
    del capsule
    record, wait, free = calls(*FENCES, "cuMemFreeAsync")[len(before) :]
    assert record.endswith(f" stream={consumer:#x}")
    assert wait.startswith(f"cuStreamWaitEvent stream={producer:#x} ")
    assert free == f"cuMemFreeAsync stream={producer:#x}"


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
    class Stream:
        def __init__(self, index: int) -> None:
            self.device_index = index
            self.handle = new_stream(index)

        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, self.handle

    for index in (0, 1):
        with pytest.raises(ValueError, match=f"is a stream of cuda:{index}, the memory is on cuda:{1 - index}"):
            gpuconst.full(10, 1.0, device=f"cuda:{1 - index}", stream=Stream(index))
    assert not launches()


@on_standin()
def test_a_stream_of_one_device_for_a_plan_of_two_is_refused_before_either_is_filled() -> None:
    class Stream:
        device_index = 0
        cuda_stream = new_stream()

    arrays = [gpuconst.zeros(10, device=f"cuda:{index}") for index in range(2)]
    plan = gpuconst.plan_fill(arrays, 1.0)
    with pytest.raises(ValueError, match="is a stream of cuda:0, the memory is on cuda:1"):
        plan.fill(stream=Stream())
    assert len(launches()) == len(arrays)  # the zeros


@pytest.mark.parametrize("stream", [True, False, -1, 1.0, "1"])
@on_standin()
def test_what_is_no_stream_is_refused(stream: Any) -> None:
    array = gpuconst.zeros(10, device="cuda")
    with pytest.raises(TypeError, match=f"{stream!r} is no stream"):
        gpuconst.full(10, 1.0, device="cuda", stream=stream)
    with pytest.raises(TypeError, match=f"{stream!r} is no stream"):
        gpuconst.fill(array, 1.0, stream=stream)
    assert len(launches()) == 1


@pytest.mark.parametrize("stream", [True, 0, -2, 1.0])
@on_standin()
def test_what_is_no_stream_of_dlpack_is_refused(stream: Any) -> None:
    array = gpuconst.zeros(10, device="cuda")
    with pytest.raises(ValueError, match=f"stream={stream} is no CUDA stream number of DLPack"):
        array.__dlpack__(stream=stream)


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


@pytest.mark.parametrize(("count", "waits"), [(1, 0), (2, 1)])
@on_standin()
def test_a_plan_with_a_table_is_waited_for_when_it_is_made(count: int, waits: int) -> None:
    arrays = [gpuconst.zeros(n, device="cuda") for n in range(1, count + 1)]
    plan = gpuconst.plan_fill(arrays, 1.0)
    for _ in range(3):
        plan.fill()
        assert len(calls("cuStreamSynchronize")) == waits


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
    for index in (0, 1):
        stream = new_stream(index)
        array = gpuconst.full((64, 64), 1.0, device=f"cuda:{index}", stream=stream)  # with the one kernel loaded then
        plan = gpuconst.plan_fill([Foreign(array, shape=(10,)), Foreign(array, 80, shape=(5,), strides=(12,))], 3.0)
        before = len(launches())
        with captured(stream):
            gpuconst.fill(Foreign(array, shape=(5,), strides=(8,)), 2.0, stream=stream)
            plan.fill(stream=stream)
        kernels = [launch.split()[0] for launch in launches()[before:]]
        assert kernels == ["fill_strided32", "fill_run", "fill_strided32"]


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


@pytest.mark.parametrize("use", ["fill", "plan"])
@on_standin()
def test_an_array_waits_for_its_last_fill_that_ran_not_for_one_that_was_captured(use: str) -> None:
    filled_on, captured_on = new_stream(), new_stream()
    array = gpuconst.zeros(10, device="cuda", stream=filled_on)
    plan = gpuconst.plan_fill([array], 1.0)
    with captured(captured_on):
        if use == "fill":
            gpuconst.fill(array, 3.0, stream=captured_on)
        else:
            plan.fill(stream=captured_on)
    assert array.__cuda_array_interface__["stream"] == filled_on


@on_standin()
def test_memory_whose_stream_is_captured_is_given_back_afterwards() -> None:
    stream = new_stream()
    arrays = [gpuconst.zeros(n, device="cuda", stream=stream) for n in (10, 20)]
    kept = gpuconst.zeros(10, device="cuda")
    plan = gpuconst.plan_fill([Foreign(array, shape=array.shape) for array in arrays], 1.0)
    plan.fill(stream=stream)
    with captured(stream):
        del arrays[1], plan  # an array of the stream, and a table that it has read
        gc.collect()
        gpuconst.zeros(10, device="cuda")
        assert not calls("cuMemFreeAsync")[1:]  # of the last line alone
    assert len(alive("m")) == 4
    gpuconst.zeros(10, device="cuda", stream=stream)
    assert set(alive("m")) == {arrays[0].data_ptr(), kept.data_ptr()}


@on_standin()
def test_the_legacy_stream_is_let_alone_while_a_capture_closes_it() -> None:
    consumer, stream = new_stream(), new_stream(blocking=True)
    arrays = [gpuconst.zeros(n, device="cuda") for n in (10, 20)]
    gpuconst.fill(arrays[1], 1.0, stream=consumer)
    with captured(stream):
        with pytest.raises(RuntimeError, match="legacy default stream .* non-blocking stream"):
            gpuconst.fill(arrays[0], 1.0, stream=consumer)
        with pytest.raises(RuntimeError, match="graph is being captured"):
            gpuconst.zeros(10, device="cuda")
        address = arrays.pop().data_ptr()
        gc.collect()
        gpuconst.zeros(10, device="cuda", stream=consumer)
        assert address in alive("m")
    gpuconst.zeros(10, device="cuda", stream=consumer)
    assert list(alive("m")) == [arrays[0].data_ptr()]


@on_standin()
def test_what_is_kept_during_a_capture_is_given_back_once() -> None:
    stream = new_stream()
    for _ in range(3):
        array = gpuconst.zeros(10, device="cuda", stream=stream)
        with captured(stream):
            del array
            gc.collect()
        gpuconst.zeros(10, device="cuda")
    gc.collect()
    assert not alive("m")
    assert len(calls("cuMemFreeAsync")) == 6


@on_standin()
@pytest.mark.parametrize("kept_before", [False, True])
def test_an_interrupt_does_not_give_memory_back_before_its_user_is_done(kept_before: bool) -> None:
    consumer, order = new_stream(), cuda_driver.order

    def interrupt(first: int, then: int, index: int) -> None:
        cuda_driver.order = order
        raise KeyboardInterrupt

    array = gpuconst.zeros(10, device="cuda")
    array.__dlpack__(stream=consumer)
    address = array.data_ptr()
    with captured(consumer) if kept_before else nullcontext():
        if not kept_before:
            cuda_driver.order = interrupt
        with patch.object(sys, "unraisablehook", lambda _: None):  # where interrupts in finalizers go
            del array
    if kept_before:
        cuda_driver.order = interrupt
        with pytest.raises(KeyboardInterrupt):
            gpuconst.zeros(10, device="cuda")
    assert address in alive("m")
    assert not calls("cuStreamWaitEvent")[1:]
    gpuconst.zeros(10, device="cuda")
    assert not alive("m")
    assert calls("cuStreamWaitEvent")[1:]


@on_standin()
def test_a_signal_handler_may_make_a_plan_while_another_is_made() -> None:
    arrays = [gpuconst.zeros(10, device="cuda") for _ in range(2)]
    plans: list[gpuconst.FillPlan] = []
    query = cuda_driver._library().cuEventQuery

    def interrupted(event: Any) -> Any:
        cuda_driver._library().cuEventQuery = query
        plans.append(gpuconst.plan_fill(arrays, [3.0, 4.0]))  # as the handler of a signal that came just here would
        return query(event)

    cuda_driver._library().cuEventQuery = interrupted
    plans.append(gpuconst.plan_fill(arrays, [1.0, 2.0]))
    for plan, expected in zip(plans, [3.0, 1.0], strict=True):
        plan.fill()
        assert arrays[0].to_numpy()[0] == expected


@on_standin()
def test_another_threads_default_stream_is_waited_for_through_the_legacy_one() -> None:
    per_thread, consumer = 2, new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=per_thread)
    assert "stream=0x2" in calls("launch")[-1]
    assert array.__cuda_array_interface__["stream"] == 1
    gpuconst.fill(array, 2.0, stream=consumer)
    assert calls("cuEventRecord")[-1].endswith("stream=(nil)")
    assert calls("cuStreamWaitEvent")[-1].startswith(f"cuStreamWaitEvent stream={consumer:#x}")
    before = len(calls())
    del array
    gc.collect()
    recorded = [line.split()[2] for line in calls()[before:] if line.startswith("cuEventRecord")]
    waiting = [line.split()[1] for line in calls()[before:] if line.startswith("cuStreamWaitEvent")]
    assert recorded == ["stream=(nil)", f"stream={consumer:#x}"]
    assert waiting == ["stream=0x2"] * 2
    assert calls("cuMemFreeAsync")[-1] == "cuMemFreeAsync stream=0x2"


@pytest.mark.parametrize("use", ["full_many", "fill", "fill_many", "plan"])
@on_standin()
def test_a_per_thread_default_stream_is_remembered_as_the_legacy_one(use: str) -> None:
    per_thread = 2
    if use == "full_many":
        array = gpuconst.full_many({"a": (10, 1.0, None)}, device="cuda", stream=per_thread)["a"]
    else:
        array = used_on(per_thread, gpuconst.full(10, 1.0, device="cuda", stream=new_stream()), use)
    assert "stream=0x2" in calls("launch")[-1]
    assert array.__cuda_array_interface__["stream"] == 1


@on_standin()
def test_a_fill_on_another_stream_waits_for_the_one_that_a_capsule_was_asked_for() -> None:
    class Exporter:
        asked: list[Any] = []

        def __dlpack__(self, *, stream: Any, **arguments: Any) -> Any:
            self.asked.append(stream)
            return array.__dlpack__(stream=stream, **arguments)

        def __dlpack_device__(self) -> tuple[int, int]:
            return array.__dlpack_device__()

    producer, consumer = new_stream(), new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=producer)
    before = len(calls(*FENCES))
    gpuconst.fill(Exporter(), 2.0, stream=consumer)
    assert Exporter.asked == [1]
    exported, waits, record, wait, launch = (line.split() for line in calls(*FENCES)[before:])
    assert exported[2] == f"stream={producer:#x}"
    assert waits[:2] == ["cuStreamWaitEvent", "stream=0x1"]
    assert record[2] == "stream=(nil)"
    assert wait[:2] == ["cuStreamWaitEvent", f"stream={consumer:#x}"]
    assert f"stream={consumer:#x}" in launch


@on_standin(CAPTURE="cupy", STANDIN_RUNTIME=1)
def test_nothing_is_done_outside_of_the_graph_that_cupy_captures() -> None:
    import cupy

    array = gpuconst.zeros(10, device="cuda")
    before = launches()
    refused = pytest.raises(RuntimeError, match=r"pass stream=cupy\.cuda\.get_current_stream\(0\)$")
    with cupy.cuda.Stream(non_blocking=True) as current, captured(current.ptr), refused:
        gpuconst.fill(array, 1.0)
    assert launches() == before
