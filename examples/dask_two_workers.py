"""A dask array whose blocks are filled by two workers, each where it will be used.

Run it as ``python examples/dask_two_workers.py``.
"""

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from dask.distributed import Client, LocalCluster

import gpuconst

CHUNKS = ((1024,) * 16, (8192,))  # 16 blocks of 64 MiB


def block(block_info: Any) -> np.ndarray:
    """Return a new block; on a GPU, use `to_cupy()` instead."""
    return gpuconst.full(block_info[None]["chunk-shape"], 0.5, dtype="float64", device="cpu").to_numpy()


def peak() -> int:
    """Return the peak memory of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10


def main() -> None:
    """Fill and reduce the array, and print the memory it took."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        array = da.map_blocks(block, chunks=CHUNKS, dtype="float64", meta=np.empty((0, 0)))
        before = client.run(peak)
        assert array.sum().compute() == array.size / 2
        for number, (worker, after) in enumerate(client.run(peak).items()):
            grown = after - before[worker]
            print(f"worker {number}: peak grew by {grown} MiB, the array has {array.nbytes >> 20} MiB", flush=True)


if __name__ == "__main__":
    main()
