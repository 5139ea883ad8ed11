"""A weight of 512 MiB takes the memory of one, on each backend of Keras; Keras' own Constant takes two."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")

MIB = 1 << 20

# The kernel keeps the peak of a process's resident memory, and starts anew when it is told so.
MEASURE = """
    import gc, json, pathlib
    import keras, gpuconst.keras

    def resident(field):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    def peak(initializer, shape):
        gc.collect()
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        weight = keras.Variable(initializer, shape=shape)
        getattr(weight.value, "block_until_ready", int)()  # JAX is still at work
        return resident("VmHWM") - before

    made = {"ours": gpuconst.keras.Constant(0.5), "stock": keras.initializers.Constant(0.5)}
    for initializer in made.values():
        peak(initializer, (128, 128))  # imports and compiles
    print(json.dumps({name: peak(initializer, (128, 1 << 20)) for name, initializer in made.items()}))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_peak_of_a_large_weight(backend: str, run_python: Callable[..., str]) -> None:
    output = run_python(
        MEASURE, KERAS_BACKEND=backend, CUDA_VISIBLE_DEVICES="-1", JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3"
    )
    found = json.loads(output.splitlines()[-1])
    assert 0.95 < found["ours"] / (512 * MIB) < 1.1
    assert 1.9 < found["stock"] / (512 * MIB) < 2.2
