"""New memory on the CPU: what is in it, where it lies, how long it lives, and who else has it."""

import copy
import doctest
import gc
import itertools
import os
import pickle
import random
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

import gpuconst
from gpuconst import creation
from gpuconst.dtypes import DTYPES
from gpuconst.kernels import host_memory

full = partial(gpuconst.full, device="cpu")

KIB, MIB = 1 << 10, 1 << 20
# Around every size at which memory or the fill is done another way: slabs, rows, blocks of their own,
# huge pages, two threads.
EDGES = [16 * KIB, 128 * KIB, MIB, 2 * MIB, 4 * MIB, 32 * MIB]
SIZES = sorted({1, 2, 255, 256, 257, 4096, *(edge + step for edge in EDGES for step in (-1, 0, 1, 4097))})


def interval(array: gpuconst.Array) -> tuple[int, int]:
    return array.data_ptr(), array.data_ptr() + array.nbytes


def assert_disjoint(arrays: list[gpuconst.Array]) -> None:
    ordered = sorted(interval(array) for array in arrays if array.nbytes)
    for (_, end), (start, _) in itertools.pairwise(ordered):
        assert end <= start


# What is in it


@given(st.data(), st.sampled_from(list(DTYPES)), array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=9))
def test_the_same_bytes_as_numpy(data: st.DataObject, dtype: str, shape: tuple[int, ...]) -> None:
    itemsize = DTYPES[dtype].itemsize
    elements = st.sampled_from([b"\0", b"\1"]) if dtype == "bool" else st.binary(min_size=itemsize, max_size=itemsize)
    scalar = np.frombuffer(data.draw(elements), DTYPES[dtype].numpy)[0]
    array, expected = full(shape, scalar, dtype=dtype).to_numpy(), np.full(shape, scalar, DTYPES[dtype].numpy)
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "complex128"])
def test_every_size(nbytes: int, dtype: str) -> None:
    row = DTYPES[dtype]
    element = bytes(range(1, row.itemsize + 1))
    array = full(max(nbytes // row.itemsize, 1), element, dtype=dtype)
    assert array.data_ptr() % 256 == 0
    unsigned = array.to_numpy().view([("words", f"u{min(row.itemsize, 8)}", (max(row.itemsize // 8, 1),))])["words"]
    assert (unsigned == np.frombuffer(element, unsigned.dtype)).all()


@pytest.mark.parametrize("nbytes", SIZES)
def test_zeros_where_something_was_before(nbytes: int) -> None:
    full(nbytes, 255, dtype="uint8")
    assert not gpuconst.zeros(nbytes, dtype="uint8", device="cpu").to_numpy().any()


def test_zeros_where_small_arrays_were_before() -> None:
    several_slabs = [full(900 * KIB, 1, dtype="uint8") for _ in range(6)]
    del several_slabs
    for _ in range(3):
        assert not full(1500 * KIB, 0, dtype="uint8").to_numpy().any()


@pytest.mark.parametrize("nbytes", [400, 512 * KIB, 4 * MIB, 40 * MIB])
def test_negative_zero_is_no_zero(nbytes: int) -> None:
    array = full(nbytes // 4, -0.0).to_numpy()
    assert np.signbit(array).all()


def test_zeros_and_ones() -> None:
    zeros, ones = gpuconst.zeros((2, 3), device="cpu"), gpuconst.ones((2, 3), dtype="bfloat16", device="cpu")
    assert zeros.to_numpy().tolist() == np.zeros((2, 3)).tolist()
    assert ones.to_numpy().tolist() == np.ones((2, 3)).tolist()


@pytest.mark.parametrize("make", [gpuconst.zeros, gpuconst.ones])
def test_zeros_and_ones_are_made_where_they_are_asked_for(make: Callable[..., gpuconst.Array]) -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        make(1, device="tpu")
    with pytest.raises(ValueError, match="stream=0 was given"):
        make(1, device="cpu", stream=0)


def test_what_an_array_says_of_itself() -> None:
    array = full((2, 3), 0.1, dtype="bfloat16")
    assert repr(array) == "gpuconst.Array(shape=(2, 3), dtype=bfloat16, device='cpu', backend='numpy')"
    assert (array.shape, array.ndim, array.size, array.itemsize, array.nbytes) == ((2, 3), 2, 6, 2, 12)
    assert (array.device, array.backend, len(array)) == ("cpu", "numpy", 2)
    assert array.dtype == DTYPES["bfloat16"].numpy


def test_it_can_be_iterated_over() -> None:
    assert list(full(3, 1.5)) == [1.5] * 3
    assert [row.tolist() for row in full((2, 2), True)] == [[True, True]] * 2
    with pytest.raises(TypeError, match="0-d"):
        iter(full((), 1.5))


def test_rows_are_views() -> None:
    array = full((2, 3), 1.0)
    for value, row in enumerate(array):
        row[...] = value
    assert array.to_numpy().tolist() == [[0] * 3, [1] * 3]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_not_copied(duplicate: Callable[[gpuconst.Array], object]) -> None:
    words = r"Array\(shape=\(3,\), .*\) cannot be copied or pickled; pickle to_numpy\(\), or fill anew"
    with pytest.raises(TypeError, match=words):
        duplicate(full(3, 1.5))


def test_it_has_no_truth_value() -> None:
    for shape in [(), (0,), (3,)]:
        with pytest.raises(TypeError, match="an Array has no truth value"):
            bool(gpuconst.ones(shape, device="cpu"))


def test_the_example_in_the_documentation() -> None:
    failed, attempted = doctest.testmod(creation)
    assert (failed, attempted > 0) == (0, True)


# Where it lies


@pytest.mark.parametrize("nbytes", [2 * MIB, 2 * MIB + 1, 5 * MIB, 33 * MIB])
def test_large_blocks_start_on_a_huge_page(nbytes: int) -> None:
    mmap = pytest.importorskip("mmap")
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no transparent huge pages")
    assert full(nbytes, 1, dtype="uint8").data_ptr() % (2 * MIB) == 0


def test_c_order_and_writable() -> None:
    array = full((3, 4, 5), 1.0).to_numpy()
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array[1, 2, 3] = 7
    assert array.sum() == 66


def test_numpy_sees_the_memory_itself() -> None:
    array = full((2, 3), 1.0)
    for view in [array.to_numpy(), np.asarray(array), np.array(array, copy=False), np.from_dlpack(array)]:
        assert view.ctypes.data == array.data_ptr()
    assert np.array(array).ctypes.data != array.data_ptr()
    assert np.asarray(array, dtype="float64").tolist() == [[1.0] * 3] * 2


def test_a_view_can_be_changed_without_changing_the_array() -> None:
    array = full((2, 3), 1.0)
    view = array.to_numpy()
    view.flags.writeable = False
    if np.lib.NumpyVersion(np.__version__) < "2.5.0":  # from then on NumPy warns
        view.dtype = np.dtype("int32")  # type: ignore[misc]
    assert np.from_dlpack(array).dtype == np.float32
    assert array.to_numpy().flags.writeable


# Who else has it: nobody


@given(st.lists(st.sampled_from([0, 1, 100, 256, 257, 4096, 100 * KIB, MIB, MIB + 1]), min_size=2, max_size=40))
def test_live_arrays_are_aligned_and_no_two_share_memory(sizes: list[int]) -> None:
    arrays = [full(nbytes, 1, dtype="uint8") for nbytes in sizes]
    assert not any(array.data_ptr() % 256 for array in arrays)
    assert_disjoint(arrays)
    assert not gpuconst.shares_memory(arrays[0], arrays[1])
    assert gpuconst.shares_memory(arrays[-1], arrays[-1].to_numpy()) == bool(sizes[-1])


def test_a_training_step_on_one_changes_no_other() -> None:
    torch = pytest.importorskip("torch")
    first, second = (torch.nn.Parameter(full((4, 4), 0.5).to_torch()) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=0.1)
    (first * second.detach()).sum().backward()
    optimizer.step()
    assert (first == 0.5 - 0.1 * 0.5).all()
    assert (second == 0.5).all()
    assert (full((4, 4), 0.5).to_numpy() == 0.5).all()


# How long it lives


def numpy_view(array: gpuconst.Array) -> Any:
    return array.to_numpy()


def numpy_import(array: gpuconst.Array) -> Any:
    return np.from_dlpack(array)


def torch_import(array: gpuconst.Array) -> Any:
    pytest.importorskip("torch")
    return array.to_torch()


def torch_slice(array: gpuconst.Array) -> Any:
    return torch_import(array)[5:9]


def jax_import(array: gpuconst.Array) -> Any:
    pytest.importorskip("jax")
    return array.to_jax()


@pytest.mark.parametrize("consume", [numpy_view, numpy_import, torch_import, torch_slice, jax_import])
@pytest.mark.parametrize("nbytes", [64, 64 * KIB, MIB, 3 * MIB])
def test_a_consumer_outlives_the_array(consume: Callable[[gpuconst.Array], Any], nbytes: int) -> None:
    array = full(nbytes // 4, 0.5)
    start, end = interval(array)
    consumer = consume(array)
    del array
    later = [full(nbytes // 4, 2.0) for _ in range(4 * MIB // max(nbytes, 256) + 2)]
    assert all(other.data_ptr() >= end or other.data_ptr() + other.nbytes <= start for other in later)
    assert (np.asarray(consumer) == 0.5).all()


def test_memory_is_used_again_once_nothing_lives_in_it() -> None:
    pages = {full(64 * KIB, 1, dtype="uint8").data_ptr() // (2 * MIB) for _ in range(1000)}
    assert len(pages) <= 4  # and not the 32 that they would fill


def test_memory_is_not_used_again_while_anything_lives_in_it() -> None:
    kept = [full(256, 1, dtype="uint8") for _ in range(50)]
    for _ in range(1000):
        full(64 * KIB, 2, dtype="uint8")
    assert_disjoint([*kept, *(full(64 * KIB, 2, dtype="uint8") for _ in range(100))])
    assert all((array.to_numpy() == 1).all() for array in kept)


def test_a_profiler_that_keeps_frames_frees_no_memory_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_recent", deque(maxlen=2))  # so that a block is made
    frames: list[FrameType] = []
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: frames.append(frame))
    try:
        x = full(3 * MIB, 7, dtype="uint8").to_numpy()
    finally:
        sys.setprofile(before)
    frames.clear()
    gc.collect()
    full(3 * MIB, 9, dtype="uint8")
    assert (x == 7).all()


def test_a_large_block_is_used_again_for_what_needs_half_of_it() -> None:
    start, stop = interval(full(32 * MIB, 1, dtype="uint8"))
    assert not start <= full(2 * MIB, 1, dtype="uint8").data_ptr() < stop
    assert full(16 * MIB, 1, dtype="uint8").data_ptr() == start
    assert full(32 * MIB, 1, dtype="uint8").data_ptr() == start


@pytest.mark.parametrize(("nbytes", "kept"), [(32 * MIB, True), (33 * MIB, False)])
def test_a_block_is_kept_unless_it_is_very_large(nbytes: int, kept: bool) -> None:
    memory: Any = full(nbytes, 1, dtype="uint8").to_numpy()
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    block = weakref.ref(memory.base)
    del memory
    gc.collect()
    assert (block() is not None) == kept


def test_memory_in_use_is_what_was_asked_for(run_python: Callable[..., str]) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells a process its own peak")
    zeros, ones, dropped = map(
        int,
        run_python(
            """
            from pathlib import Path
            import gpuconst

            def peak():
                return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

            before = peak()
            zeros = gpuconst.zeros(64 << 20, device="cpu")  # 256 MiB, untouched
            print(peak() - before)
            before = peak()
            ones = gpuconst.ones(16 << 20, device="cpu")  # 64 MiB
            print(peak() - before)
            before = peak()
            for _ in range(20):
                ones = None
                ones = gpuconst.ones(16 << 20, device="cpu")
            for _ in range(20_000):
                gpuconst.ones(1000, device="cpu")
            print(peak() - before)
            """
        ).split(),
    )
    assert zeros < 16 * MIB
    assert 60 * MIB < ones < 80 * MIB
    assert dropped < 16 * MIB


def test_threads_that_allocate_at_once() -> None:
    kept: list[list[gpuconst.Array]] = [[] for _ in range(8)]

    def work(mark: int) -> None:
        sizes = random.Random(mark)
        for turn in range(1500):
            array = full(sizes.choice([1, 300, 5000, 70_000]), mark, dtype="uint8")
            if turn % 10 == 0:
                kept[mark].append(array)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_disjoint(list(itertools.chain(*kept)))
    assert all((array.to_numpy() == mark).all() for mark, arrays in enumerate(kept) for array in arrays)


def test_a_forked_child(run_python: Callable[..., str]) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    printed = run_python(
        """
        import os, gpuconst
        from functools import partial

        full = partial(gpuconst.full, device="cpu")
        before, large = full(1000, 1, dtype="uint8"), full(40 << 20, 1, dtype="uint8")
        child = os.fork()
        if not child:
            after, other = full(1000, 2, dtype="uint8"), full(40 << 20, 2, dtype="uint8")
            good = (after.to_numpy() == 2).all() and (other.to_numpy() == 2).all()
            good = good and (before.to_numpy() == 1).all() and (large.to_numpy() == 1).all()
            before.to_numpy()[...] = 3
            os._exit(0 if good else 1)
        after = full(1000, 4, dtype="uint8")
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), set(before.to_numpy().tolist()), set(after.to_numpy().tolist()))
        """
    )
    assert printed == "0 {1} {4}"


# Devices, backends, streams


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_cpu_by_name(device: str) -> None:
    assert gpuconst.full(1, 1, device=device).device == "cpu"


def test_a_device_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert gpuconst.full(1, 1, device=torch.device("cpu")).device == "cpu"
    with pytest.raises(ValueError, match="unknown device 'meta'"):
        gpuconst.full(1, 1, device=torch.device("meta"))


@pytest.mark.parametrize(
    "device", ["gpu", "CPU", "cpu:1", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "tpu", "", 0, b"cpu"]
)
def test_an_unknown_device_is_told_the_known_ones(device: Any) -> None:
    with pytest.raises(ValueError, match="unknown device .*; devices are 'cpu', 'cuda' and 'cuda:N'"):
        gpuconst.full(1, 1, device=device)


def test_a_device_by_the_name_that_others_give_it() -> None:
    for device in ("gpu", "gpu:0"):
        with pytest.raises(ValueError, match="; a GPU is 'cuda' here$"):
            gpuconst.full(1, 1, device=device)


@pytest.mark.parametrize("stream", [0, 1, -1, object()])
def test_a_stream_for_the_cpu(stream: Any) -> None:
    with pytest.raises(ValueError, match=r"stream=.* was given, but the memory is on the CPU, which has none"):
        full(1, 1, stream=stream)


def test_dtype_and_device_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        gpuconst.full(1, 1, "float32")  # type: ignore[call-arg]


@pytest.fixture
def run_without_gpu(run_python: Callable[..., str]) -> Callable[..., str]:
    def run(code: str, backend: str = "") -> str:
        return run_python(code, CUDA_VISIBLE_DEVICES="", GPUCONST_BACKEND=backend)

    return run


FAILING = """
import gpuconst
try:
    print(gpuconst.full(1, 1, device={device!r}))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_a_gpu_says_why_not(run_without_gpu: Callable[..., str], device: str) -> None:
    printed = run_without_gpu(FAILING.format(device=device))
    assert printed.startswith(f"DeviceUnavailableError device '{device}' cannot be used: cupy: ")
    assert "; numba: " in printed
    assert printed.endswith("the CPU works everywhere")


def test_without_a_gpu_the_default_is_the_cpu_and_the_log_says_why(run_without_gpu: Callable[..., str]) -> None:
    printed = run_without_gpu(
        """
        import logging, sys, gpuconst
        logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s: %(message)s")
        print(gpuconst.full(1, 1).device)
        """
    ).splitlines()
    assert printed[0].startswith("gpuconst: backend cupy passed over: ")
    assert printed[1].startswith("gpuconst: backend numba passed over: ")
    assert printed[2:] == ["cpu"]


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_an_unknown_backend_is_told_the_known_ones(run_without_gpu: Callable[..., str], device: str | None) -> None:
    printed = run_without_gpu(FAILING.format(device=device), backend="cuda")
    assert printed == "ValueError GPUCONST_BACKEND='cuda' names no backend; there are 'cupy', 'numba', 'numpy'"


@pytest.mark.parametrize("backend", ["cupy", "numba"])
def test_a_backend_that_is_asked_for_is_used_or_refused(run_without_gpu: Callable[..., str], backend: str) -> None:
    printed = run_without_gpu(FAILING.format(device=None), backend=backend)
    assert printed.startswith(f"DeviceUnavailableError GPUCONST_BACKEND={backend} cannot be used: {backend}: ")
    assert printed.endswith("unset GPUCONST_BACKEND to choose among all")


@pytest.mark.parametrize("backend", ["cupy", "numba", "numpy"])
def test_a_backend_that_is_asked_for_leaves_the_cpu_alone(run_without_gpu: Callable[..., str], backend: str) -> None:
    assert "device='cpu', backend='numpy'" in run_without_gpu(FAILING.format(device="cpu"), backend=backend)


def test_the_numpy_backend_makes_the_cpu_the_default(run_without_gpu: Callable[..., str]) -> None:
    assert "device='cpu', backend='numpy'" in run_without_gpu(FAILING.format(device=None), backend="numpy")


def test_a_first_small_array_touches_no_huge_page(run_python: Callable[..., str]) -> None:
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not choice.exists() or "[madvise]" not in choice.read_text():
        pytest.skip("the system has no huge pages for those who ask")
    run_python(
        """
        import re
        from pathlib import Path
        from gpuconst.kernels.host_fill import fill_stretch
        from gpuconst.kernels.host_memory import HUGE_PAGE, reserve

        def resident():
            return 1024 * int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

        before = resident()
        kept = reserve(4000)
        fill_stretch(kept[1], 4000, b"1234")
        assert resident() - before < HUGE_PAGE / 2
        """
    )
