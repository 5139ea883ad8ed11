"""Ray actors that each keep their part of a large array, filled where it lives.

Arrays are made inside the actors: those that `ray.get` returns are read-only, so `gpuconst.fill` refuses them.
Run it as ``python examples/ray_actors.py``.
"""

from pathlib import Path

import numpy as np
import ray

import gpuconst

PARTS, LENGTH = 2, 16 << 20  # 64 MiB of float32 each


def peak() -> int:
    """Return the peak memory of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10


@ray.remote
class Part:
    """A part of the array."""

    def __init__(self) -> None:
        self.before = peak()
        self.array = gpuconst.full(LENGTH, 0.5, device="cpu").to_numpy()

    def grown(self) -> int:
        """Return the growth of the peak memory of this process, in MiB."""
        return peak() - self.before

    def refill(self, value: float) -> float:
        """Refill the part in place, and return its mean."""
        return float(gpuconst.fill(self.array, value).mean())

    def head(self) -> np.ndarray:
        """Return the first elements."""
        return self.array[:1000]


def main() -> None:
    """Fill and refill the array, and print the memory it took."""
    ray.init(num_cpus=PARTS, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    parts = [Part.remote() for _ in range(PARTS)]
    assert ray.get([part.refill.remote(2.0) for part in parts]) == [2.0] * PARTS
    for number, grown in enumerate(ray.get([part.grown.remote() for part in parts])):
        print(f"actor {number}: peak grew by {grown} MiB, the array has {PARTS * LENGTH * 4 >> 20} MiB", flush=True)
    try:
        gpuconst.fill(ray.get(parts[0].head.remote()), 1.0)
    except ValueError as error:
        print(f"refused: {error}")
    ray.shutdown()


if __name__ == "__main__":
    main()
