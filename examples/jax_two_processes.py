"""A JAX array over two processes, each of which fills only its own shards.

Run it as ``python examples/jax_two_processes.py``.
"""

import multiprocessing
import socket
from pathlib import Path

SHAPE = (8192, 8192)  # 256 MiB of float32 in all
PROCESSES, DEVICES_EACH = 2, 2


def peak() -> int:
    """Return the peak memory of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10


def work(rank: int, port: int) -> None:
    """Fill the shards of this process, and compute with the whole array."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, rank)

    import gpuconst

    mesh = jax.make_mesh((PROCESSES * DEVICES_EACH,), ("rows",))
    sharding = jax.NamedSharding(mesh, jax.P("rows"))
    jax.device_put(0).block_until_ready()
    before = peak()
    buffers = []
    for device in sharding.addressable_devices:
        shard = gpuconst.full(sharding.shard_shape(SHAPE), 0.5, device="cpu").to_numpy()
        buffers.append(jax.device_put(shard, device, may_alias=True))
    array = jax.make_array_from_single_device_arrays(SHAPE, sharding, buffers)
    grown = peak() - before
    assert jax.jit(lambda x: x.max() + x.min())(array) == 1.0
    print(f"process {rank}: peak grew by {grown} MiB, the array has {array.nbytes >> 20} MiB", flush=True)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, port)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    raise SystemExit(any(process.exitcode for process in processes))
