"""`gpuconst.shares_memory`: a byte in common, across libraries and protocols."""

import mmap
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lying_capsules import CUDA, DLPackOnly, Exporter

import gpuconst

# The same memory in each library, from an array of ours.
ACROSS: dict[str, Callable[[gpuconst.Array], Any]] = {
    "itself": lambda x: x,
    "NumPy": lambda x: x.to_numpy(),
    "read-only NumPy": lambda x: np.broadcast_to(x.to_numpy(), (2, 3, 4)),
    "torch": lambda x: x.to_torch(),
    "torch view": lambda x: x.to_torch()[1:, ::2],
    "torch parameter": lambda x: torch.nn.Parameter(x.to_torch()),
    "JAX": lambda x: x.to_jax(),
    "tvm_ffi": lambda x: pytest.importorskip("tvm_ffi").from_dlpack(x),
    "DLPack": DLPackOnly,
    "memoryview": lambda x: x.to_numpy().data,
    "array interface": lambda x: SimpleNamespace(__array_interface__=x.to_numpy().__array_interface__),
}


@pytest.mark.parametrize("first", ACROSS)
@pytest.mark.parametrize("second", ACROSS)
def test_libraries_that_share_memory(first: str, second: str) -> None:
    x, y = (gpuconst.ones((3, 4), device="cpu") for _ in range(2))
    assert gpuconst.shares_memory(ACROSS[first](x), ACROSS[second](x)) is True
    assert gpuconst.shares_memory(ACROSS[first](x), ACROSS[second](y)) is False


@pytest.mark.needs("tensorflow")
def test_tensorflow() -> None:
    import tensorflow as tf

    x = gpuconst.ones((3, 4), device="cpu")
    assert gpuconst.shares_memory(x.to_tensorflow(), x)
    assert not gpuconst.shares_memory(tf.identity(tf.ones((3, 4))), x)
    variable = tf.Variable(tf.ones(3))
    assert gpuconst.shares_memory(variable, variable)
    with pytest.raises(TypeError, match="unknown dtype"):
        gpuconst.shares_memory(tf.constant("text"), x)


@pytest.mark.parametrize("make", [lambda: bytearray(8), lambda: b"12345678", lambda: mmap.mmap(-1, 8)])
def test_buffers(make: Callable[[], Any]) -> None:
    x = make()
    assert gpuconst.shares_memory(x, np.frombuffer(x, np.uint8)[3:])
    assert not gpuconst.shares_memory(x, bytearray(8))


@pytest.mark.parametrize(
    ("view", "shares"),
    [
        pytest.param(lambda a: (a[::2], a[1::2]), False, id="interleaved"),
        pytest.param(lambda a: (a[:5], a[5:]), False, id="neighbours"),
        pytest.param(lambda a: (a[:5], a[4:]), True, id="one element in common"),
        pytest.param(lambda a: (a[::3], a[::2]), True, id="different steps"),
        pytest.param(lambda a: (a[::-1], a[9:]), True, id="flipped"),
        pytest.param(lambda a: (a[:0], a), False, id="empty"),
        pytest.param(lambda a: (a[3:3], a[3:3]), False, id="both empty"),
        pytest.param(lambda a: (a.view(np.int8)[3:4], a[:1]), True, id="the last byte"),
        pytest.param(lambda a: (a.view(np.int8)[4:5], a[:1]), False, id="the byte after"),
        pytest.param(lambda a: (a[:1].reshape(()), a[:1]), True, id="0-d"),
    ],
)
def test_bytes_decide(view: Callable[[np.ndarray], tuple[Any, Any]], shares: bool) -> None:
    first, second = view(np.ones(10, np.float32))
    assert gpuconst.shares_memory(first, second) is shares
    assert gpuconst.shares_memory(second, first) is shares


@st.composite
def views(draw: st.DrawFn, memory: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """Any array in a memory, and the places of its bytes there."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    strides = [draw(st.integers(-12, 12)) for _ in shape]
    steps = [(max(n, 1) - 1) * s for n, s in zip(shape, strides, strict=True)]
    low, high = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
    start = draw(st.integers(-low, memory.nbytes - itemsize - high))
    found = np.ndarray(shape, DTYPES[itemsize], memory.data, start, strides)
    offsets = [start + sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(*shape)]
    return found, {offset + byte for offset in offsets for byte in range(itemsize)}


DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("f2"),
    4: np.dtype("f4"),
    8: np.dtype("f8"),
    16: np.dtype("c16"),
}
MEMORY = np.zeros(160, np.uint8)


@given(views(MEMORY), views(MEMORY))
def test_any_views(first: tuple[np.ndarray, set[int]], second: tuple[np.ndarray, set[int]]) -> None:
    assert gpuconst.shares_memory(first[0], second[0]) is not first[1].isdisjoint(second[1])


def test_lazy_torch_views_share_the_memory_of_their_base() -> None:
    x = torch.ones(3, dtype=torch.complex64)
    assert gpuconst.shares_memory(x, x.conj())
    assert gpuconst.shares_memory(x, x.conj().imag)
    assert not gpuconst.shares_memory(x.real, x.imag)


def test_copies_do_not_share() -> None:
    x = gpuconst.ones(3, device="cpu")
    assert not gpuconst.shares_memory(x, x.to_torch().clone())
    assert not gpuconst.shares_memory(x, jnp.array(x.to_jax(), copy=True))
    assert not gpuconst.shares_memory(x, x.to_numpy().copy())


def test_it_writes_nothing_and_may_be_asked_of_what_must_not_be_written() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert gpuconst.shares_memory(parameter, parameter.detach())
    assert parameter._version == 0
    x = jnp.ones(3)
    assert gpuconst.shares_memory(x, x)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param([1, 2], "list is no array", id="list"),
        pytest.param(None, "NoneType is no array", id="None"),
        pytest.param(np.float64(1), "is a NumPy scalar", id="NumPy scalar"),
        pytest.param(torch.ones(3, device="meta"), "on meta, expected a CPU or CUDA tensor", id="meta tensor"),
        pytest.param(torch.eye(2).to_sparse(), "no memory of its own", id="sparse tensor"),
        pytest.param(
            torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
            "keeps its data in other tensors",
            id="jagged tensor",
        ),
    ],
)
def test_what_has_no_memory_is_refused(other: Any, message: str) -> None:
    x = np.ones(3)
    with pytest.raises(TypeError, match=message):
        gpuconst.shares_memory(x, other)
    with pytest.raises(TypeError, match=message):
        gpuconst.shares_memory(other, x)


def test_what_would_take_too_long_to_find_out_may_be_shared() -> None:
    """The example of `numpy.shares_memory` for a problem that takes it a minute."""
    memory = np.zeros(192163377, np.int8)
    strides = (36674, 61119, 85569)
    first = np.lib.stride_tricks.as_strided(memory, strides=strides, shape=(1049, 1049, 1049))
    second = np.lib.stride_tricks.as_strided(memory[64023025:], strides=(12223, 12224, 1), shape=(1049, 1049, 1))
    start = time.monotonic()
    assert gpuconst.shares_memory(first, second)
    assert time.monotonic() - start < 5


def test_one_address_on_two_devices_is_not_shared() -> None:
    on_cpu = Exporter()
    on_gpu, on_another = (Exporter(device_type=CUDA, device_id=n, data=on_cpu.memory.ctypes.data) for n in (0, 1))
    assert gpuconst.shares_memory(on_cpu, on_cpu.memory)
    assert gpuconst.shares_memory(on_gpu, on_gpu)
    assert not gpuconst.shares_memory(on_cpu, on_gpu)
    assert not gpuconst.shares_memory(on_gpu, on_another)


@pytest.mark.parametrize(("first", "stride"), [(4096 + 8, -1), (2**63 - 12, 1)])
def test_the_lowest_and_the_highest_address_that_memory_can_have(first: int, stride: int) -> None:
    x = np.ones(3)
    assert not gpuconst.shares_memory(x, Exporter(data=first, shape=(3,), strides=(stride,)))
    with pytest.raises(ValueError, match="no memory is there"):
        gpuconst.shares_memory(x, Exporter(data=first + stride, shape=(3,), strides=(stride,)))


@pytest.mark.gpu
def test_devices_share_nothing() -> None:
    x = gpuconst.ones(3, device="cuda")
    assert gpuconst.shares_memory(x, x.to_torch() if torch.cuda.is_available() else x)
    assert not gpuconst.shares_memory(x, gpuconst.ones(3, device="cuda"))
    assert not gpuconst.shares_memory(x, gpuconst.ones(3, device="cpu"))
