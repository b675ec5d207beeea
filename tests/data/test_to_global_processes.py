"""The global batch over two processes with two devices each, whichever axis lies between the processes."""

import socket
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxinfra.data.prefetch import process_rows, to_global

port, rank = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank, initialization_timeout=60)
whole = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
devices = np.array(jax.devices())
layouts = {
    "batch across processes": (devices.reshape(2, 2), P("fsdp", "context")),
    "sequence across processes": (devices.reshape(2, 2).T, P("fsdp", "context")),
    "rows interleaved": (devices.reshape(2, 2).T, P(("fsdp", "context"), None)),
    "replicated": (devices.reshape(2, 2), P(None, None)),
}
for name, (grid, spec) in layouts.items():
    mesh = jax.sharding.Mesh(grid, ("fsdp", "context"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, spec)
    rows = process_rows(sharding, (8, 6))
    placed = to_global({"inputs": whole[rows]}, {"inputs": sharding}, global_batch=8)["inputs"]
    assert placed.shape == (8, 6), name
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index], err_msg=name)
    print(name, rows.tolist(), flush=True)
"""


@pytest.mark.slow
def test_each_device_gets_its_part_of_the_global_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "batch across processes [0, 1, 2, 3]" in outputs[0]
    assert "batch across processes [4, 5, 6, 7]" in outputs[1]
    assert "sequence across processes [0, 1, 2, 3, 4, 5, 6, 7]" in outputs[1]
