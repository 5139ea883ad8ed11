"""The CUDA path without a GPU, on stand-in devices: memory, launches, and errors.

The Numba backend runs on them whole; CuPy, whose runtime asks a driver for more, is refused here, and
so shows how a backend is passed over. In `test_cupy_host_path` it gets another runtime.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_standin import (
    MIB,
    Foreign,
    alive,
    calls,
    current_context,
    current_device,
    launches,
    new_stream,
    on_standin,
)
from lying_capsules import IS_COPIED

import gpuconst
from gpuconst.backends import select
from gpuconst.dlpack import read_capsule
from gpuconst.kernels import runs
from gpuconst.kernels.runs import BLOCK, CHUNK

pytestmark = pytest.mark.needs("numba_cuda")


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
    gpuconst.fill(Foreign(array, -array.data_ptr(), shape=(3, 0)), 2.0)  # at address 0
    assert array.to_numpy().shape == (3, 0)
    assert not launches()


@on_standin()
def test_words_of_any_bits_reach_the_kernels() -> None:
    array = gpuconst.full(9000, -1, dtype="int64", device="cuda")
    expected = np.full(9000, -1)
    gpuconst.fill(Foreign(array, shape=(9000,)), -(2**63))
    expected[:] = -(2**63)
    gpuconst.fill(Foreign(array, shape=(3000,), strides=(24,)), -2)
    expected[::3] = -2
    gpuconst.fill_many([Foreign(array, 8, shape=(600,)), Foreign(array, 40000, shape=(700,))], [-3, -4])
    expected[1:601], expected[5000:5700] = -3, -4
    np.testing.assert_array_equal(array.to_numpy(), expected)
    kernels = [launch.split()[0] for launch in launches()]
    assert kernels == ["fill_run", "fill_run", "fill_strided32", "fill_runs"]


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


@on_standin()
def test_what_the_cuda_array_interface_says() -> None:
    array = gpuconst.full((3, 5), 1, dtype="int16", device="cuda:1")
    assert array.__cuda_array_interface__ == {
        "shape": (3, 5),
        "typestr": "<i2",
        "data": (array.data_ptr(), False),
        "version": 3,
        "stream": 1,
    }
    assert not hasattr(gpuconst.ones(3, dtype="bfloat16", device="cuda"), "__cuda_array_interface__")


@on_standin()
def test_a_copy_for_a_consumer_on_the_host() -> None:
    array = gpuconst.full((3, 5), 1.5, device="cuda:1")
    on_devices = alive("m")
    np.testing.assert_array_equal(np.from_dlpack(array, device="cpu"), np.full((3, 5), 1.5))
    tensor, flags = read_capsule(capsule := array.__dlpack__(dl_device=(1, 0), max_version=(1, 1)))
    assert (tensor.device_type, tensor.device_id, flags) == (1, 0, IS_COPIED)
    assert alive("m") == on_devices
    assert ctypes.string_at(tensor.data, array.nbytes) == array.to_numpy().tobytes()
    del capsule


@on_standin()
def test_an_export_that_is_not_possible_copies_nothing() -> None:
    array = gpuconst.full(10, 1.0, device="cuda:1")
    with pytest.raises(gpuconst.CopyNeededError, match="memory of cuda:1 cannot be read as host memory"):
        array.__dlpack__(dl_device=(1, 0), copy=False)
    with pytest.raises(BufferError, match=r"from DLPack device \(2, 1\) to \(2, 0\); only to \(2, 1\) or \(1, 0\)$"):
        array.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ValueError, match="stream=0 is no CUDA stream number of DLPack"):
        array.__dlpack__(dl_device=(1, 0), stream=0)
    assert not calls("cuMemcpyAsync")


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
def test_what_is_wrong_with_an_allocation_is_not_always_a_lack_of_memory() -> None:
    with pytest.raises(OverflowError):
        gpuconst.zeros(1, device="cuda", stream=1 << 64)


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


@pytest.mark.needs("tensorflow")
@on_standin(CONSUMER="tensorflow")
def test_a_fill_has_finished_before_tensorflow_gets_the_array() -> None:
    stream = new_stream()
    array = gpuconst.full(10, 1.0, device="cuda", stream=stream)
    with pytest.raises(BufferError, match="this TensorFlow can use no GPU; copy the array"):
        array.to_tensorflow()
    assert calls("cuStreamSynchronize") == [f"cuStreamSynchronize stream={stream:#x}"]
