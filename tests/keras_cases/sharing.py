"""The weights are the memory that gpuconst filled, no two share any, and they train. On the backends that do."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_cases.weights import BACKEND, LAYERS, OURS, address, as_numpy, filled_addresses, layer

import gpuconst.keras
from gpuconst import DeviceUnavailableError
from gpuconst.keras import Constant, Ones, Zeros


@pytest.mark.parametrize("name", LAYERS)
def test_every_weight_is_memory_that_gpuconst_filled(name: str) -> None:
    with filled_addresses() as filled:
        built, shape = layer(name, OURS)
        built.build(shape)
    copied = {weight.name for weight in built.weights if address(weight) not in filled}
    # Keras puts that bias together from three parts.
    assert copied == ({"bias"} if name == "LSTM with unit_forget_bias" else set())


def test_keras_own_initializers_are_told_apart() -> None:
    with filled_addresses() as filled:
        built, shape = layer("Dense", keras.initializers)
        built.build(shape)
    assert all(address(weight) not in filled for weight in built.weights)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (100, 64), (1000, 1000)])
def test_every_dtype_and_size(dtype: str, shape: tuple[int, ...]) -> None:
    with filled_addresses() as filled:
        variable = keras.Variable(Constant(3), shape=shape, dtype=dtype, trainable=False)
    assert address(variable) in filled
    assert address(variable) % 256 == 0
    assert (as_numpy(variable.value) == 3).all()


@pytest.mark.parametrize("shape", [6400, [100, 64], (np.int64(100), 64), np.array([100, 64])], ids=repr)
def test_every_kind_of_shape(shape: Any) -> None:
    with filled_addresses() as filled:
        weight = Constant(0.5)(shape)
    assert address(weight) in filled
    assert (as_numpy(weight) == 0.5).all()


# To torch "cpu:0" is another device than the "cpu" of every tensor: Keras copies all its variables there.
@pytest.mark.parametrize("name", ["cpu"] if BACKEND == "torch" else ["cpu", "cpu:0"])
def test_in_a_device_scope(name: str) -> None:
    with keras.device(name), filled_addresses() as filled:
        variable = keras.Variable(Constant(0.5), shape=(100, 64))
    assert address(variable) in filled
    assert (as_numpy(variable.value) == 0.5).all()


def test_no_two_weights_share_memory() -> None:
    initializers = [Constant(0.5), Zeros(), Ones(), Constant(np.full((8, 8), 0.5)), Constant(0.5)]
    shared = Constant(0.5)
    variables = [keras.Variable(made, shape=(8, 8)) for made in (*initializers, shared, shared)]
    before = [as_numpy(variable.value).copy() for variable in variables]
    for first, second in itertools.combinations(variables, 2):
        assert abs(address(first) - address(second)) >= 8 * 8 * 4
    for changed, variable in enumerate(variables):
        variable.assign(keras.ops.full((8, 8), 100.0 + changed))
        for other, value in enumerate(before):
            expected = 100.0 + other if other <= changed else value
            assert (as_numpy(variables[other].value) == expected).all()


def test_training_one_model_leaves_its_twin_alone() -> None:
    initializer = Constant(0.1)

    def model() -> Any:
        made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_initializer=initializer)])
        made.compile(optimizer=keras.optimizers.SGD(0.5), loss="mse")
        return made

    with filled_addresses() as filled:
        first, second = model(), model()
    first.fit(np.ones((4, 4), "float32"), np.ones((4, 2), "float32"), verbose=0)
    assert (as_numpy(first.layers[0].kernel.value) != np.float32(0.1)).all()
    # torch trains in that memory; JAX and TensorFlow put other memory in its place.
    assert (address(first.layers[0].kernel) in filled) == (BACKEND == "torch")
    assert address(second.layers[0].kernel) in filled
    assert (as_numpy(second.layers[0].kernel.value) == np.float32(0.1)).all()
    assert (as_numpy(initializer((4, 2))) == np.float32(0.1)).all()


def test_loaded_weights(tmp_path: Path) -> None:
    initializer = Constant(0.5)

    def model() -> Any:
        dense = keras.layers.Dense(4, kernel_initializer=initializer, bias_initializer=initializer)
        return keras.Sequential([keras.Input((4,)), dense])

    saved = model()
    for weight in saved.weights:
        weight.assign(weight.value + 1)
    saved.save_weights(tmp_path / "model.weights.h5")
    with filled_addresses() as filled:
        loaded, twin = model(), model()
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert [address(weight) in filled for weight in loaded.weights] == [BACKEND == "torch"] * 2
    assert all((as_numpy(weight.value) == 1.5).all() for weight in loaded.weights)
    assert all((as_numpy(weight.value) == 0.5).all() for weight in twin.weights)
    assert (as_numpy(initializer((4, 4))) == 0.5).all()


@pytest.fixture
def _warns_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpuconst.keras, "_warned", set())


@pytest.mark.usefixtures("_warns_anew")
def test_an_unreachable_device_is_left_to_keras_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no way to lose a real device here: the CPU is always reachable.
    def refuse(*_: object, **__: object) -> None:
        raise DeviceUnavailableError("device 'cuda:0' cannot be used: cupy: it is not installed")

    monkeypatch.setattr(gpuconst.keras, "full", refuse)
    with pytest.warns(RuntimeWarning, match="could not fill a weight.*cuda:0.*not installed") as caught:
        weights = [Constant(0.5)((2, 3)), Zeros()((4,)), Ones()((5,), "int32"), Constant(np.float16(2))((2,))]
    assert len(caught) == 1
    assert [as_numpy(weight).ravel()[0] for weight in weights] == [0.5, 0, 1, 2]


@pytest.mark.usefixtures("_warns_anew")
def test_another_reason_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter([DeviceUnavailableError("no driver"), MemoryError("no room"), MemoryError("no room again")])

    def refuse(*_: object, **__: object) -> None:
        raise next(reasons)

    monkeypatch.setattr(gpuconst.keras, "full", refuse)
    with pytest.warns(RuntimeWarning, match="could not fill a weight") as caught:
        weights = [Zeros()((2,)) for _ in range(3)]
    assert not any(as_numpy(weight).any() for weight in weights)
    assert [str(warning.message).rpartition(": ")[2] for warning in caught] == ["no driver", "no room"]


# The heap is grown and freed again, and the address space then closed around it: Keras finds its memory
# in the heap, gpuconst asks the kernel for pages of its own and gets none.
NO_MEMORY = """
    import ctypes, resource, warnings
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.malloc.argtypes = [ctypes.c_size_t]
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    assert libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(M_ARENA_MAX, 1)

    import keras, gpuconst.keras
    shape = (64, 1 << 18)  # 64 MiB
    keras.ops.full(shape, 0.5), gpuconst.keras.Constant(0.5)(shape)  # compiled and warm
    libc.free(libc.malloc(256 << 20))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = gpuconst.keras.Constant(0.5)(shape), gpuconst.keras.Constant(2.5)(shape)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert float(keras.ops.max(first)) == float(keras.ops.min(first)) == 0.5
    assert float(keras.ops.max(second)) == 2.5
    print(*(f"{warning.category.__name__}: {warning.message}" for warning in caught), sep="\\n")
"""


def test_a_failed_allocation_is_left_to_keras_with_one_warning(run_python: functools.partial[str]) -> None:
    lines = run_python(NO_MEMORY, KERAS_BACKEND=BACKEND).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("RuntimeWarning: gpuconst could not fill a weight")
    assert "67,108,864 bytes" in lines[0]
