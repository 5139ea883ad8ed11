"""A weight of 512 MiB takes the memory of one, on each backend of Keras; Keras' own Constant takes two.

In shards on eight devices it takes the memory of the shards, and a replica on each takes that of eight.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from installed import each

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc"),
    pytest.mark.needs("keras"),
]

MIB = 1 << 20

# The kernel keeps the peak of a process's resident memory, and starts anew when it is told so.
PEAK = """
    import gc, json, pathlib
    import keras, gpuconst.keras

    def resident(field):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    def peak(make):
        gc.collect()
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        weights = make()
        for weight in weights:
            getattr(weight.value, "block_until_ready", int)()  # JAX is still at work
        return resident("VmHWM") - before

    ours, stock = gpuconst.keras.Constant(0.5), keras.initializers.Constant(0.5)
"""

ONE_DEVICE = """
    def make(initializer, shape):
        return lambda: [keras.Variable(initializer, shape=shape)]

    made = {"ours": ours, "stock": stock}
    for initializer in made.values():
        peak(make(initializer, (128, 128)))  # imports and compiles
    print(json.dumps({name: peak(make(initializer, (128, 1 << 20))) for name, initializer in made.items()}))
"""

EIGHT_DEVICES = """
    def sharded():
        layout_map = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((1, 8), ["batch", "model"]))
        layout_map[".*"] = (None, "model")
        return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")

    def make(initializer, columns, count=1):
        return lambda: [keras.Variable(initializer, shape=(1024, columns)) for _ in range(count)]

    def make_whole_first(columns):
        def whole():
            array = gpuconst.full((1024, columns), 0.5, device="cpu").to_jax()
            return [keras.Variable(array)]
        return whole

    found = {}
    for strategy in (sharded(), keras.distribution.DataParallel()):
        name, columns = type(strategy).__name__, (1 << 17) // strategy.num_model_replicas
        with strategy.scope():
            for initializer in (ours, stock):
                peak(make(initializer, 1024))
            found[name] = {
                "ours": peak(make(ours, columns)),
                "stock": peak(make(stock, columns)),
                "whole first": peak(make_whole_first(columns)),
                "ours, in 64": peak(make(ours, columns // 64, 64)),
            }
    print(json.dumps(found))
"""


def _peaks(run_python: Callable[..., str], code: str, **environment: str) -> Any:
    environment |= {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # what is freed must not serve the next weight, unseen
    return json.loads(run_python(PEAK + code, **environment).splitlines()[-1])


@pytest.mark.parametrize("backend", each("tensorflow", "jax", "torch"))
def test_peak_of_a_large_weight(backend: str, run_python: Callable[..., str]) -> None:
    found = _peaks(run_python, ONE_DEVICE, KERAS_BACKEND=backend)
    assert 0.95 < found["ours"] / (512 * MIB) < 1.1
    assert 1.9 < found["stock"] / (512 * MIB) < 2.2


def test_peak_of_weights_on_eight_devices(run_python: Callable[..., str]) -> None:
    flags = "--xla_force_host_platform_device_count=8"
    found = _peaks(run_python, EIGHT_DEVICES, KERAS_BACKEND="jax", XLA_FLAGS=flags)
    for peaks in found.values():
        assert 0.95 < peaks["ours"] / (512 * MIB) < 1.1
        assert 0.95 < peaks["ours, in 64"] / (512 * MIB) < 1.1
        assert peaks["ours"] < 1.1 * peaks["stock"]
    assert found["ModelParallel"]["whole first"] > 1.9 * 512 * MIB
