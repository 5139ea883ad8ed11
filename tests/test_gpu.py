"""The real device: every kernel of every backend, streams, hand-over, graphs and limits.

Where there is no GPU each of these is skipped with the driver's reason; the kernels are then proven by
`test_cuda_compile`, `test_ptx` and `test_numba_simulator`, the host side by `test_cuda_host_path`
and its neighbours.
"""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from installed import require

import gpuconst
from gpuconst import backends
from gpuconst.dtypes import DTYPES
from gpuconst.kernels import cuda_driver
from gpuconst.kernels.runs import BLOCK, CHUNK, Region
from gpuconst.values import encode

pytestmark = pytest.mark.gpu

GUARD = 64
ELEMENTS = {n: bytes(range(1, n + 1)) for n in (1, 2, 4, 8, 16)}
LENGTHS = [*range(0, 20), 31, 32, 33, 255, CHUNK - 1, CHUNK, CHUNK + 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


@pytest.fixture(params=["cupy", "numba"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each CUDA backend in turn, as the one that ``device="cuda"`` means."""
    reason = backends.load(request.param).why_not(0)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setenv(backends.VARIABLE, request.param)
    backends._places.clear()
    yield request.param
    backends._places.clear()


@pytest.fixture
def place(backend: str) -> backends.Place:
    found = backends.select("cuda:0")
    assert found.backend == backend
    return found


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch", reason="torch is not installed")
    if not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return module


class Memory:
    """Device memory full of poison, read back as bytes."""

    def __init__(self, place: backends.Place, nbytes: int) -> None:
        self.place, self.nbytes = place, nbytes
        self._owner, self.address = place.module.full(nbytes, b"\xee", place.index, 0)

    def poison(self) -> None:
        self.place.module.fill(Region(self.address, (self.nbytes,), (1,), b"\xee"), self.place.index, 0)

    def read(self) -> np.ndarray:
        out = np.empty(self.nbytes, np.uint8)
        self.place.module.copy(out.ctypes.data, self.address, self.nbytes, self.place.index, 0)
        self.place.module.synchronize(self.place.index, 0)
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (1000, 37), (257, 4096)])
def test_full_has_the_bytes_of_the_cpu(backend: str, dtype: str, shape: tuple[int, ...]) -> None:
    made = gpuconst.full(shape, 1, dtype=dtype, device="cuda")
    assert (made.backend, made.device, made.data_ptr() % 256) == (backend, "cuda:0", 0)
    expected = gpuconst.full(shape, 1, dtype=dtype, device="cpu").to_numpy()
    assert made.to_numpy().dtype == expected.dtype
    assert made.to_numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("itemsize", ELEMENTS)
def test_every_offset_and_length(place: backends.Place, itemsize: int) -> None:
    memory = Memory(place, max(LENGTHS) + 2 * GUARD + 16)
    element = ELEMENTS[itemsize]
    for offset in range(17):
        for length in LENGTHS:
            count = length // itemsize
            memory.poison()
            region = Region(memory.address + GUARD + offset, (count,), (itemsize,), element)
            place.module.fill(region, place.index, 0)
            expected = np.full(memory.nbytes, 0xEE, np.uint8)
            start = GUARD + offset
            expected[start : start + count * itemsize] = np.frombuffer(element * count, np.uint8)
            np.testing.assert_array_equal(memory.read(), expected, f"offset {offset}, {count} elements")


@pytest.mark.parametrize("itemsize", ELEMENTS)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((7, 40), (100, 1)),
        ((5, 3), (64, 2)),
        ((4, 3, 2), (60, 20, 3)),
        ((3, 4, 5, 2), (500, 90, 12, 3)),
        ((2, 3, 2, 3, 2), (900, 200, 60, 13, 3)),
        ((6, 100), (-128, 1)),
    ],
)
def test_strided(place: backends.Place, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    memory = Memory(place, 64 << 10)
    steps = tuple(stride * itemsize for stride in strides)
    start = 32 << 10
    element = ELEMENTS[itemsize]
    place.module.fill(Region(memory.address + start, shape, steps, element), place.index, 0)
    expected = np.full(memory.nbytes, 0xEE, np.uint8)
    view = np.ndarray(shape, f"V{itemsize}", expected.data, start, steps)
    view[...] = np.frombuffer(element, f"V{itemsize}")
    np.testing.assert_array_equal(memory.read(), expected)


def test_thousands_of_tensors_in_one_launch(backend: str, torch: Any) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.complex128, torch.bool, torch.float8_e5m2]
    xs = [torch.zeros(n % 3000, dtype=dtypes[n % len(dtypes)], device="cuda") for n in range(10_000)]
    strided = torch.zeros(64, 64, device="cuda").T[3:9, ::2]
    values = [n % 2 for n in range(10_000)]
    gpuconst.fill_many([*xs, strided], [*values, 7.5])
    for x, value in zip(xs, values, strict=True):
        element = np.frombuffer(encode(value, gpuconst.dtypes.resolve_dtype(x.dtype)) * x.numel(), np.uint8)
        np.testing.assert_array_equal(x.view(torch.uint8).cpu().numpy(), element)
    assert bool((strided == 7.5).all())


def test_overlapping_tensors_are_filled_in_their_order(backend: str, torch: Any) -> None:
    x = torch.zeros(1000, device="cuda")
    gpuconst.fill_many([x, x[100:300], x[200:400], x[:1]], [1.0, 2.0, 3.0, 4.0])
    expected = torch.ones(1000)
    expected[100:200], expected[200:400], expected[0] = 2.0, 3.0, 4.0
    assert torch.equal(x.cpu(), expected)


def test_autograd_notices(backend: str, torch: Any) -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    y = x * 2
    loss = (y * y).sum()
    with torch.no_grad():
        gpuconst.fill(y, 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_plan_is_captured_and_replayed(backend: str, torch: Any) -> None:
    xs = [torch.zeros(n, device="cuda") for n in (1, 1000, 5000)]
    plan = gpuconst.plan_fill(xs, [1.0, 2.0, 3.0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.fill()
    for _ in range(3):
        torch._foreach_zero_(xs)
        graph.replay()
        torch.cuda.synchronize()
        assert [float(x.max()) for x in xs] == [1.0, 2.0, 3.0]
        assert [float(x.min()) for x in xs] == [1.0, 2.0, 3.0]


def test_capture_may_come_before_any_fill(backend: str, torch: Any) -> None:
    code = """
import gpuconst, torch
xs = [torch.zeros(n, device="cuda") for n in (1, 1000, 5000)]
plan = gpuconst.plan_fill([*xs, xs[2][10:500:7]], [1.0, 2.0, 3.0, 4.0])
ours = gpuconst.plan_fill([gpuconst.zeros(n, device="cuda") for n in (5, 70)], 5.0)
matrix, wide = torch.zeros(64, 64, device="cuda"), torch.zeros(50, 1024, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    plan.fill()
    ours.fill(stream=torch.cuda.current_stream())
    gpuconst.fill(matrix[:, ::2], 6.0)
    gpuconst.fill(wide[:, :1000], 7.0)
graph.replay()
torch.cuda.synchronize()
expected = torch.full((5000,), 3.0)
expected[10:500:7] = 4.0
assert torch.equal(xs[2].cpu(), expected)
assert xs[0].item() == 1.0 and bool((xs[1] == 2.0).all())
assert all((array.to_numpy() == 5.0).all() for array in ours._arrays)
assert bool((matrix[:, ::2] == 6.0).all()) and not matrix[:, 1::2].any()
assert bool((wide[:, :1000] == 7.0).all()) and not wide[:, 1000:].any()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_nothing_is_done_outside_of_the_graph_that_torch_captures(backend: str, torch: Any) -> None:
    arrays = [gpuconst.zeros(n, device="cuda") for n in (10, 20)]
    plan = gpuconst.plan_fill(arrays, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in (
            lambda: gpuconst.full(3, 1.0, device="cuda"),
            lambda: gpuconst.fill(arrays[0], 1.0),
            lambda: gpuconst.fill_many(arrays, 1.0),
            plan.fill,
        ):
            with pytest.raises(RuntimeError, match=r"pass stream=torch\.cuda\.current_stream\(0\)$"):
                work()
        plan.fill(stream=torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert not any(array.to_numpy().any() for array in arrays)
    graph.replay()
    torch.cuda.synchronize()
    assert all((array.to_numpy() == 1.0).all() for array in arrays)


@pytest.mark.parametrize("what", ["full", "fill_many"])
def test_capture_refuses_what_allocates(backend: str, torch: Any, what: str) -> None:
    xs = [torch.zeros(n, device="cuda") for n in (10, 20)]
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    refused: dict[str, Callable[[], Any]] = {
        "full": lambda: gpuconst.full(3, 1.0, device="cuda", stream=stream),
        "fill_many": lambda: gpuconst.fill_many(xs, 1.0),
    }
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        with pytest.raises(RuntimeError, match="plan_fill"):
            refused[what]()
        gpuconst.fill(xs[0], 2.0)  # one array needs no table
    graph.replay()
    torch.cuda.synchronize()
    assert xs[0].tolist() == [2.0] * 10


@pytest.mark.parametrize("blocking", [False, True])
def test_memory_that_is_dropped_during_a_capture_leaves_the_graph_alone(backend: str, blocking: bool) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    stream = cupy.cuda.Stream(non_blocking=not blocking)
    x = cupy.zeros(1000, cupy.float32)
    own = gpuconst.full(1000, 1.0, device="cuda", stream=stream)
    handed = gpuconst.full(1000, 1.0, device="cuda")
    gpuconst.fill(handed, 2.0, stream=stream)
    pointers = {own.data_ptr(), handed.data_ptr()}
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        del own, handed
        gc.collect()
        gpuconst.fill(x, 3.0)
        graph = stream.end_capture()
        graph.launch(stream)
    stream.synchronize()
    assert (x.get() == 3.0).all()
    again = [gpuconst.full(1000, 1.0, device="cuda", stream=on) for on in (stream, None) for _ in range(8)]
    assert pointers & {array.data_ptr() for array in again}


def test_fill_runs_on_the_current_stream_of_torch(backend: str, torch: Any) -> None:
    stream = torch.cuda.Stream()
    x = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        gpuconst.fill(x, 1.0)
        x.mul_(2.0)  # in order only if the fill is on this stream
    stream.synchronize()
    assert bool((x == 2.0).all())


def test_fill_runs_on_the_current_stream_of_cupy(backend: str) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    stream = cupy.cuda.Stream(non_blocking=True)
    x, busy = cupy.zeros(1 << 20, cupy.float32), cupy.ones(1 << 26, cupy.float32)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(50):
            busy *= 2  # together, milliseconds
        x += 5
        gpuconst.fill(x, 1.0)
        x *= 2  # in order only if the fill is on this stream
    stream.synchronize()
    assert bool((x == 2.0).all())
    flipped = x[::-3]
    gpuconst.fill(flipped, 5.0)
    assert bool((flipped == 5.0).all())
    assert int((x == 5.0).sum()) == flipped.size


def test_consumer_waits_for_a_slow_producer(backend: str, torch: Any) -> None:
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    for round_ in range(20):
        with torch.cuda.stream(producer):
            torch.cuda._sleep(5_000_000)
        made = gpuconst.full(1 << 18, float(round_), device="cuda", stream=producer)
        with torch.cuda.stream(consumer):
            copied = torch.from_dlpack(made).clone()
        consumer.synchronize()
        assert bool((copied == round_).all())


def test_freed_memory_is_not_refilled_under_a_consumer(backend: str, torch: Any) -> None:
    consumer = torch.cuda.Stream()
    copies = []
    for round_ in range(200):
        made = gpuconst.full(1 << 16, float(round_), device="cuda")
        with torch.cuda.stream(consumer):
            shared = torch.from_dlpack(made)
            torch.cuda._sleep(100_000)
            copies.append(shared.clone())
        del made, shared
        gpuconst.full(1 << 16, -1.0, device="cuda")
    consumer.synchronize()
    assert [float(x.min()) for x in copies] == [float(n) for n in range(200)]
    assert [float(x.max()) for x in copies] == [float(n) for n in range(200)]


def test_freed_memory_is_not_refilled_under_jax_once_it_is_waited_for(backend: str) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ y / 2048, x))
    busy = jax.numpy.ones((2048, 2048))
    doubled = jax.jit(lambda x: x * 2)
    results = []
    for round_ in range(100):
        made = gpuconst.full(1 << 16, float(round_), device="cuda").to_jax()
        busy = slow(busy)
        results.append(doubled(made).block_until_ready())
        del made
        gpuconst.full(1 << 16, -1.0, device="cuda")
    assert [float(x.min()) for x in results] == [2.0 * n for n in range(100)]
    assert [float(x.max()) for x in results] == [2.0 * n for n in range(100)]


def test_memory_is_given_back_after_cupys_stream_has_gone(backend: str) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    for value in range(20):
        made = gpuconst.full(1 << 16, float(value), device="cuda")
        with cupy.cuda.Stream(non_blocking=True) as stream:
            total = made.to_cupy().sum()
        stream.synchronize()
        del stream
        gc.collect()
        assert float(total) == value * (1 << 16)
        del made, total


@pytest.mark.parametrize("kind", ["int", "torch", "cupy", "cuda.core", "numba"])
def test_streams_of_every_library(backend: str, torch: Any, kind: str) -> None:
    if kind == "int":
        owner = torch.cuda.Stream()
        stream: Any = owner.cuda_stream
    elif kind == "torch":
        stream = torch.cuda.Stream()
    elif kind == "cupy":
        stream = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.Stream()
    elif kind == "cuda.core":
        device = pytest.importorskip("cuda.core", reason="cuda-core is not installed").Device(0)
        device.set_current()
        stream = device.create_stream()
    else:
        require("numba_cuda")
        stream = importlib.import_module("numba.cuda").stream()
    made = gpuconst.full(1000, 3.0, device="cuda", stream=stream)
    gpuconst.fill(made, 4.0, stream=stream)
    assert (made.to_numpy() == 4.0).all()


def test_torch_takes_the_pointer(backend: str, torch: Any) -> None:
    names = [name for name in DTYPES if hasattr(torch, name)]
    assert "bfloat16" in names
    torch.zeros(1, device="cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    for name in names:
        made = gpuconst.full((3, 5), 1, dtype=name, device="cuda")
        tensor = made.to_torch()
        assert tensor.data_ptr() == made.data_ptr()
        assert str(tensor.dtype) == f"torch.{name}"
        assert gpuconst.shares_memory(tensor, made)
        assert tensor.view(torch.uint8).cpu().numpy().tobytes() == made.to_numpy().tobytes()
    assert torch.cuda.memory_allocated() == before


def test_jax_takes_the_pointer(backend: str) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    for name in ["float32", "bfloat16", "int8", "bool", "float8_e4m3fn"]:
        made = gpuconst.full((64, 5), 1, dtype=name, device="cuda")
        array = made.to_jax()
        assert array.unsafe_buffer_pointer() == made.data_ptr()
        assert np.asarray(array).tobytes() == made.to_numpy().tobytes()


def test_cupy_takes_the_pointer(backend: str) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    made = gpuconst.full((3, 5), 1.5, device="cuda")
    assert made.to_cupy().data.ptr == made.data_ptr()
    assert cupy.asarray(made).data.ptr == made.data_ptr()  # by the CUDA array interface
    assert float(made.to_cupy().sum()) == 22.5


def test_memory_outlives_the_array(backend: str, torch: Any) -> None:
    tensor = gpuconst.full(1 << 16, 2.0, device="cuda").to_torch()
    gc.collect()
    for _ in range(10):
        gpuconst.full(1 << 16, 9.0, device="cuda")
    torch.cuda.synchronize()
    assert bool((tensor == 2.0).all())


def test_copies_to_the_host(backend: str) -> None:
    made = gpuconst.full((3, 5), 1.5, device="cuda")
    on_host = np.from_dlpack(made, device="cpu")
    assert on_host.ctypes.data % 256 == 0
    assert (on_host == 1.5).all()
    with pytest.raises(BufferError):
        made.__dlpack__(dl_device=(1, 0), copy=False)
    with pytest.raises(TypeError, match="to_numpy"):
        np.asarray(made)


def test_full_many(backend: str, torch: Any) -> None:
    made = gpuconst.full_many({str(n): ((n,), n % 2, "bfloat16") for n in range(1, 500)}, device="cuda")
    tensors = {name: x.to_torch() for name, x in made.items()}
    assert all(x.data_ptr() % 256 == 0 for x in made.values())
    del made
    gc.collect()
    assert all(bool((x == int(name) % 2).all()) for name, x in tensors.items())


@pytest.mark.parametrize("step", [1, 2])
def test_more_elements_than_32_bits_count(backend: str, torch: Any, step: int) -> None:
    count = step * (2**31 + 4097)
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * count:
        pytest.skip(f"needs {2 * count} free bytes, there are {free}")
    tensor = gpuconst.full(count, 7, dtype="int8", device="cuda").to_torch()
    assert all(bool((part == 7).all()) for part in tensor.split(1 << 28))
    gpuconst.fill(tensor[::step], 9)
    assert all(bool((part == 9).all()) for part in tensor[::step].split(1 << 28))
    if step > 1:
        assert all(bool((part == 7).all()) for part in tensor[1::step].split(1 << 28))


def test_out_of_memory_leaves_the_device_usable(backend: str) -> None:
    total = cuda_driver.driver().devices[0].nbytes
    with pytest.raises(gpuconst.OutOfMemoryError, match="cuda:0"):
        gpuconst.full(4 * total, 1, dtype="int8", device="cuda")
    assert (gpuconst.full(10, 1.0, device="cuda").to_numpy() == 1.0).all()


def test_every_thread_has_its_own_current_device(backend: str) -> None:
    found: list[object] = []

    def work() -> None:
        before = cuda_driver.current_index()
        made = gpuconst.full(1000, 2.0, device="cuda:0")
        found.append(bool((made.to_numpy() == 2.0).all()) and cuda_driver.current_index() == before)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_a_forked_child_is_told(backend: str) -> None:
    code = """
import os, warnings, gpuconst
gpuconst.full(3, 1.0, device="cuda")
pid = os.fork()
if pid == 0:
    try:
        gpuconst.full(3, 1.0, device="cuda")
    except gpuconst.DeviceUnavailableError as error:
        assert "fork" in str(error), error
    else:
        os._exit(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = gpuconst.full(3, 1.0) if "GPUCONST_BACKEND" not in os.environ else None
    os._exit(0 if made is None or (made.device == "cpu" and caught) else 2)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    for environment in ({**os.environ}, {k: v for k, v in os.environ.items() if k != backends.VARIABLE}):
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_wrong_device_names_the_devices(backend: str) -> None:
    with pytest.raises(gpuconst.DeviceUnavailableError, match=r"cuda:0 \("):
        gpuconst.full(3, 1.0, device="cuda:99")


def test_info_names_the_device(backend: str) -> None:
    found = gpuconst.info()
    assert found.devices
    assert {row.name: row.why_not for row in found.backends}[backend] is None


def test_keras_weights_share_the_memory(backend: str, torch: Any) -> None:
    require("keras")  # not importorskip: importing it here would need the backend that Keras is set to
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gpuconst", "demo", "--backend", "torch", "--device", "cuda"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"shares the memory that gpuconst's {backend} backend on cuda:0 filled") == 4
