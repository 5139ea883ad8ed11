"""A torch model sharded by FSDP2, from the meta device to its first training step.

No process ever holds the whole model: each gives memory and values to its own shards.
Run it as ``python examples/fsdp_two_processes.py``.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import gpuconst

PROCESSES = 2


def peak() -> int:
    """Return the peak memory of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10


def normal_(shard: torch.Tensor) -> None:
    """Draw this process's part of a weight."""
    shard.to_local().normal_(std=0.02)


def work(rank: int, store: str) -> None:
    """Build, shard, materialize and train."""
    dist.init_process_group("gloo", store=dist.FileStore(store, PROCESSES), rank=rank, world_size=PROCESSES)
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    with torch.device("meta"):
        model = nn.Sequential(*[nn.TransformerEncoderLayer(1024, 8, 4096) for _ in range(6)])
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(rank)
    before = peak()
    gpuconst.torch.materialize_(model, {"*bias": 0.0, "*norm*.weight": 1.0, "*": normal_})
    grown = peak() - before
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    print(f"process {rank}: peak grew by {grown} MiB, the model has {nbytes >> 20} MiB", flush=True)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(torch.ones(4, 1, 1024)).square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"{folder}/store",), PROCESSES)
