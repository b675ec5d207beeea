"""Two real processes with mesh.replica=2: the compiled step sends only the gradients from one to the other."""

import json
import os
import subprocess
import sys

import pytest

from tests.several import all_ended, free_address
from tests.tiny_run import Tiny

SCRIPT = """
import json, math, sys
import jax, jaxinfra
from tests.bench.slices import crossing_collectives
from jaxinfra.program import Program
from jaxinfra.parallel.mesh import make_mesh

jaxinfra.join()
run = jaxinfra.load(sys.argv[1], sys.argv[2:]).run
program = Program(run, make_mesh(run.mesh, jax.devices()))
crossing, _ = crossing_collectives(run)
shards = [4 * math.prod(p.sharding.shard_shape(p.shape)) for p in jax.tree.leaves(program.params)]
rows = [[each.kind, each.axes, each.loops, each.runs, each.array_bytes] for each in crossing]
print(json.dumps({"crossing": rows, "shards": shards}))
"""
SUMS = 3
"""Scalars of the loss: cross-entropy, z-loss, weight."""


@pytest.mark.slow(10)
def test_gradients_alone_cross_processes_once_a_step(tiny: Tiny) -> None:
    """No loop, over microbatches or layers, has a collective that leaves its process."""
    host, _, port = free_address().rpartition(":")
    where = {"JAX_COORDINATOR_ADDRESS": f"{host}:{port}", "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "4"}
    overrides = ("mesh.replica=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulate=2", "train.global_batch=16")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tiny.config), *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **where, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(2)
    ]
    for ended in all_ended(children):
        assert ended.code == 0, ended
        found = json.loads(ended.out.splitlines()[-1])
        kinds, _, loops, runs, sizes = zip(*found["crossing"], strict=True)
        assert set(kinds) == {"all-reduce"} and set(loops) == {0} and set(runs) == {1}
        assert sorted(size for each in sizes for size in each) == sorted([4] * SUMS + found["shards"])
