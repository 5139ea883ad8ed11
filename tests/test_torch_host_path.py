"""torch's own CUDA tensors on stand-in devices: its allocator, streams and captures, on the stand-in's runtime.

torch's kernels cannot run there: tensors are made empty, and read by copying them to the host.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cuda_standin import calls, driver, launches, new_stream, on_standin

import gpuconst
from gpuconst.dtypes import DTYPES
from gpuconst.values import encode

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
if not str(torch.version.cuda).startswith("13."):
    pytest.skip("this torch is not built for CUDA 13", allow_module_level=True)

pytestmark = pytest.mark.needs("cupy", "numba_cuda")

on_torch = on_standin(GPUCONST_BACKEND="cupy", STANDIN_RUNTIME=1, STANDIN_TORCH=1)
on_torch_with_numba = on_standin(GPUCONST_BACKEND="numba", STANDIN_RUNTIME=1, STANDIN_TORCH=1)

TORCH = [name for name in DTYPES if hasattr(torch, name)]


def read(tensor: Any) -> bytes:
    contents: bytes = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return contents


def streams() -> list[str]:
    """Return the stream and device of each launch."""
    return [line.partition("stream=")[2] for line in calls("launch")]


@contextmanager
def captured(stream: Any = None) -> Iterator[None]:
    """Capture torch's work, and fail if something spoils the graph."""
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        yield


@pytest.mark.parametrize("dtype", TORCH)
@on_torch
def test_fill(dtype: str) -> None:
    for index in (0, 1):
        tensor = torch.empty(37, 5, dtype=getattr(torch, dtype), device=f"cuda:{index}")
        version = tensor._version
        assert gpuconst.fill(tensor, 1) is tensor
        assert tensor._version == version + 1
        assert read(tensor) == encode(1, DTYPES[dtype]) * tensor.numel()
        assert calls("launch")[-1].endswith(f"device={index}")
        assert torch.cuda.current_device() == 0


@on_torch
def test_fill_of_tensors_with_gaps_and_of_none() -> None:
    matrix = torch.empty(40, 50, device="cuda:1")
    gpuconst.fill(matrix, 1.0)
    gpuconst.fill(matrix.T[3:30:2, ::3], 2.0)
    expected = torch.ones(40, 50)
    expected.T[3:30:2, ::3] = 2.0
    assert torch.equal(matrix.cpu(), expected)
    row = torch.empty(1, 7, device="cuda")
    gpuconst.fill(row.expand(5, 7), 3.0)
    assert row.tolist() == [[3.0] * 7]
    number = len(launches())
    gpuconst.fill(torch.empty(0, device="cuda"), 1.0)
    assert len(launches()) == number


@on_torch
def test_fill_is_on_torchs_current_stream_of_the_device() -> None:
    ours = [torch.cuda.Stream(device=index) for index in (0, 1)]
    tensors = [torch.empty(10, device=f"cuda:{index}") for index in (0, 1)]
    expected = [f"{stream.cuda_stream:#x} device={index}" for index, stream in enumerate(ours)]
    plan = gpuconst.plan_fill(tensors, 3.0)
    with torch.cuda.stream(ours[0]), torch.cuda.stream(ours[1]):
        for tensor in tensors:
            gpuconst.fill(tensor, 1.0)
        gpuconst.fill_many([*tensors, torch.empty(3)], 2.0)
        plan.fill()
    assert streams() == expected * 3


@on_torch
def test_a_stream_of_another_device_is_refused() -> None:
    stream, tensor = torch.cuda.Stream(device=0), torch.empty(10, device="cuda:1")
    for fill in (gpuconst.fill, lambda x, value, stream: gpuconst.fill_many([x], value, stream=stream)):
        with pytest.raises(ValueError, match="is a stream of cuda:0, the memory is on cuda:1"):
            fill(tensor, 1.0, stream=stream)
    assert not launches()


@on_torch
def test_torchs_current_device_is_followed() -> None:
    with torch.cuda.device(1):
        for device in (None, "cuda", torch.device("cuda")):
            assert gpuconst.full(3, 1.0, device=device).device == "cuda:1"
        assert gpuconst.full(3, 1.0, device=torch.device("cuda:0")).device == "cuda:0"
        assert torch.cuda.current_device() == 1
    assert gpuconst.full(3, 1.0).device == "cuda:0"


@pytest.mark.parametrize("dtype", TORCH)
@on_torch
def test_torch_takes_the_pointer(dtype: str) -> None:
    for index in (0, 1):
        array = gpuconst.full((3, 4), 1, dtype=dtype, device=f"cuda:{index}")
        allocated = torch.cuda.memory_allocated(index)
        tensors = [array.to_torch(), torch.from_dlpack(array)]
        if hasattr(array, "__cuda_array_interface__"):
            tensors.append(torch.as_tensor(array, device=f"cuda:{index}"))
        for tensor in tensors:
            assert (tensor.data_ptr(), tensor.get_device()) == (array.data_ptr(), index)
            assert str(tensor.dtype) == f"torch.{dtype}"
            assert gpuconst.shares_memory(tensor, array)
        assert torch.cuda.memory_allocated(index) == allocated
        assert torch.cuda.current_device() == 0


@on_torch
def test_torchs_current_stream_waits_for_the_fill() -> None:
    ours, theirs = torch.cuda.Stream(), torch.cuda.Stream()
    array = gpuconst.full(1000, 1.0, device="cuda", stream=ours)
    with torch.cuda.stream(theirs):
        array.to_torch()
    record, wait = calls("cuEventRecord", "cuStreamWaitEvent")[-2:]
    assert f"stream={ours.cuda_stream:#x}" in record
    assert f"stream={theirs.cuda_stream:#x}" in wait


@on_torch
def test_memory_outlives_its_array() -> None:
    made = gpuconst.full_many({str(n): (n, n, "int32") for n in range(1, 300)}, device="cuda:1")
    tensor = made["7"].to_torch()
    del made
    gc.collect()
    gpuconst.full(1 << 16, -1, dtype="int32", device="cuda:1")
    assert tensor.tolist() == [7] * 7


@on_torch
def test_autograd_notices() -> None:
    leaf = torch.empty(3, device="cuda", requires_grad=True)
    for fill in (gpuconst.fill, lambda x, value: gpuconst.fill_many([x], value)):
        with pytest.raises(RuntimeError, match="requires grad"):
            fill(leaf, 1.0)
    plan = gpuconst.plan_fill([leaf.detach()], 2.0)
    with torch.no_grad():
        version = leaf._version
        gpuconst.fill(leaf, 1.0)
        gpuconst.fill_many([leaf], 1.0)
        plan.fill()
        assert leaf._version == version + 3
    assert leaf.tolist() == [2.0] * 3


@on_torch
def test_a_plan_goes_stale() -> None:
    tensors = [torch.empty(3, device="cuda"), torch.empty(4, device="cuda")]
    plan = gpuconst.plan_fill(tensors, 1.0)
    assert plan.stale() == []
    tensors[1].data = torch.empty(4, device="cuda")
    assert plan.stale() == [1]


@on_torch
def test_fill_many_is_one_launch_per_device() -> None:
    dtypes = [torch.float32, torch.int8, torch.bfloat16]
    tensors = [torch.empty(n % 50, device=f"cuda:{n % 2}", dtype=dtypes[n % 3]) for n in range(2000)]
    gpuconst.fill_many(tensors, [n % 3 for n in range(2000)])
    assert len(launches()) == 2
    for n, tensor in enumerate(tensors):
        assert tensor.tolist() == [n % 3] * (n % 50)


@on_torch
def test_tensors_are_filled_together_with_all_else() -> None:
    import cupy

    matrix = torch.zeros(4, 4).cuda()
    tensors = [torch.empty(7, device="cuda"), torch.empty(3), torch.empty(8, pin_memory=True)]
    others: list[Any] = [cupy.empty(7, cupy.float32), gpuconst.zeros(5, device="cuda"), np.empty(4, np.float32)]
    gpuconst.fill_many([*tensors, *others, matrix[:, ::2], torch.empty(3, device="meta")], 2.5)
    assert matrix.tolist() == [[2.5, 0.0] * 2] * 4
    for filled in [*tensors, torch.from_dlpack(others[0]), others[1].to_numpy(), others[2]]:
        assert filled.tolist() == [2.5] * len(filled)


@on_torch
def test_materialize() -> None:
    for device in ("cuda", "cuda:1", torch.device("cuda", 1)):
        with torch.device("meta"):
            module = torch.nn.TransformerEncoderLayer(32, 4, 64)
        number = len(launches())
        gpuconst.torch.materialize_(module, {"*norm*.weight": 1.0, "*": 0.5}, device=device)
        assert len(launches()) == number + 1
        index = torch.device(device).index or 0
        assert {parameter.get_device() for parameter in module.parameters()} == {index}
        assert set(module.norm1.weight.tolist()) == {1.0}
        assert set(module.linear1.weight.flatten().tolist()) == {0.5}


@on_torch
def test_only_what_is_prepared_can_be_captured() -> None:
    tensors = [torch.empty(n, device="cuda") for n in (10, 20)]
    plan = gpuconst.plan_fill(tensors, 1.0)
    with captured():
        plan.fill()
        gpuconst.fill(tensors[0], 2.0)
        current = torch.cuda.current_stream().cuda_stream
        with pytest.raises(RuntimeError, match=r"pass stream=torch\.cuda\.current_stream\(0\)$"):
            gpuconst.full(3, 1.0, device="cuda")
        with pytest.raises(RuntimeError, match="plan_fill"):
            gpuconst.full(3, 1.0, device="cuda", stream=torch.cuda.current_stream(0))
        with pytest.raises(RuntimeError, match="plan_fill"):
            gpuconst.fill_many(tensors, 1.0)
    assert streams()[-2:] == [f"{current:#x} device=0"] * 2


@on_torch
def test_the_capture_of_another_device_does_not_matter_here() -> None:
    with captured(torch.cuda.Stream(device=1)), torch.cuda.device(0):
        assert gpuconst.full(3, 1.0, device="cuda:0").to_numpy().tolist() == [1.0] * 3
        with pytest.raises(RuntimeError, match=r"pass stream=torch\.cuda\.current_stream\(1\)$"):
            gpuconst.full(3, 1.0, device="cuda:1")


@on_torch
def test_cupy_captures_a_stream_that_torchs_current_one_synchronises_with() -> None:
    import cupy

    handle = new_stream(blocking=True)
    array = cupy.empty(10, cupy.float32)
    torch.cuda.init()
    driver().standin_capture(handle)
    try:
        with cupy.cuda.Stream.from_external(gpuconst.kernels.cuda_lease.Handle(handle)):
            gpuconst.fill(array, 1.0)
    finally:
        assert not driver().standin_capture(None)
    assert streams() == [f"{handle:#x} device=0"]


@on_torch
def test_memory_that_torch_keeps_is_named() -> None:
    kept = torch.empty(700 << 20, dtype=torch.uint8, device="cuda")
    del kept
    with pytest.raises(gpuconst.OutOfMemoryError, match=r"torch\.cuda\.empty_cache\(\)"):
        gpuconst.full(500 << 20, 1, dtype="uint8", device="cuda")
    torch.cuda.empty_cache()


@on_torch
def test_threads() -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream(device=number % 2)):
                for _ in range(10):
                    own = torch.empty(100, device=f"cuda:{number % 2}")
                    shared = gpuconst.full(50, number, dtype="int64", device=f"cuda:{number % 2}").to_torch()
                    gpuconst.fill(own, number)
                    assert set(own.tolist()) == set(shared.tolist()) == {number}
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize(
    "name", [name for name, test in vars().items() if name.startswith("test_") and not hasattr(test, "pytestmark")]
)
@on_torch_with_numba
def test_as_with_cupy(name: str) -> None:
    globals()[name].__wrapped__()
