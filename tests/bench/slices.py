"""`python -m launch bench slices`: trains on two slices with a slow link between them, with and without mesh.replica.

Each slice is a process with two emulated CPU devices in a network namespace of its own (`slow_link`). With
`mesh.replica=2` only the gradients cross the link, once a step; with `mesh.fsdp=4` every gather of parameters does.

`python -m tests.bench.slices TASK` is the process of a slice: it trains a few steps and prints JSON with the time of
one, the bytes and the loss. The bytes that are expected are those of the collectives in its compiled program.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import jax
import numpy as np

from jaxinfra.machine.checked_programs import use_cache
from jaxinfra.parity.meshes import make_program
from jaxinfra.plan.collectives import ALL_REDUCE_SLICE, Collective, find_collectives
from jaxinfra.plan.hlo import HloModule
from jaxinfra.processes.discovery import Processes
from jaxinfra.processes.join import join
from jaxinfra.processes.peers import current_peers
from jaxinfra.run import Run
from tests.bench import merge_overrides
from tests.bench.commands import WorkerError, emulated_env, require_success
from tests.bench.measure import jaxinfra_step, load_run
from tests.bench.slow_link import SlowLink, address_of, bytes_on_link
from tests.bench.table import Cases, Columns, TableRow

WORKER = (sys.executable, "-m", "tests.bench.slices")
SLICES, DEVICES = 2, 2  # slices, and devices of each
DELAY_S, BITS_PER_S = 0.025, 100e6  # in each direction, so 50 ms there and back
MODEL = ("data.seq_len=128", "model.vocab_size=2048", "model.num_layers=2")  # 3 million parameters
# The parameters are sharded inside each slice, or over both.
MESHES = {"replica": f"mesh.replica={SLICES} mesh.fsdp={DEVICES}", "fsdp": f"mesh.fsdp={SLICES * DEVICES}"}
_LIMIT_S = 1800
_PORT = 8476  # free, since a network namespace is new
# How often an array goes around the ring of its devices: to be summed, and to share the sums (gloo/allreduce.cc).
_ROUNDS = {"all-reduce": 2, ALL_REDUCE_SLICE: 2, "all-gather": 1}

COLUMNS: Columns = {
    "case": ("mesh", ""),
    "step_s": ("step", "{:.2f} s"),
    "sent_mb": ("a slice sends", "{:.2f} MB"),
    "expected_mb": ("expected", "{:.2f} MB"),
    "collectives": ("arrays that cross", "{:.0f}"),
}
NOTE = (
    f" of a step; two slices of {DEVICES} emulated devices, {1e3 * DELAY_S:.0f} ms and {BITS_PER_S / 1e6:.0f} Mbit/s "
    "each way"
)


def rows(options: argparse.Namespace, mesh: str) -> Iterator[TableRow]:
    """Measures a mesh over both slices."""
    overrides = merge_overrides((*MODEL, *options.overrides, *mesh.split()))
    with SlowLink(delay_s=DELAY_S, bits_per_s=BITS_PER_S) as link:
        tasks = [json.dumps([index, options.config, overrides, options.pairs]) for index in range(SLICES)]
        processes = [link.start([*WORKER, task], emulated_env(DEVICES)) for task in tasks]
        with ThreadPoolExecutor(SLICES) as threads:  # a full pipe of one would hold up the other
            outputs = [*threads.map(_output, processes)]
    for process, task, (_, stderr) in zip(processes, tasks, outputs, strict=True):
        require_success([*WORKER, task], process.returncode, stderr)
    results = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    yield {
        "case": mesh,
        "step_s": max(result["step_s"] for result in results),
        "sent_mb": max(result["sent_bytes"] for result in results) / 1e6,
        "expected_mb": results[0]["expected_bytes"] / 1e6,
        "collectives": results[0]["collectives"],
        "loss": results[0]["loss"],
    }


def _output(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise WorkerError(f"a slice did not end within {_LIMIT_S} s; use fewer --pairs") from None


CASES: Cases = {name: partial(rows, mesh=mesh) for name, mesh in MESHES.items()}


def crossing_collectives(run: Run) -> tuple[list[Collective], Mapping[str, int]]:
    """Returns the collectives of the compiled train step that cross processes, and the mesh."""
    program = make_program(run)
    mesh = dict(program.mesh.shape)
    processes = [device.process_index for device in np.asarray(program.mesh.devices).flat]
    module = HloModule(program.lower().compile().as_text() or "")
    return [each for each in find_collectives(module, mesh, processes) if each.link == "network"], mesh


def sent_bytes(collectives: Iterable[Collective], mesh: Mapping[str, int]) -> float:
    """Returns the bytes that a process sends to the other one in a step, of two with an equal half of the devices each.

    The n devices of a group form a ring, which crosses from one process to the other once in each direction. In a round
    each device sends n - 1 parts of 1/n of the array to the next one. In an all-to-all each device of one process sends
    such a part to each of the other.
    """
    total = 0.0
    for each in collectives:
        size = math.prod(mesh[axis] for axis in each.axes)
        parts = (size / 2) ** 2 if each.kind == "all-to-all" else _ROUNDS[each.kind] * (size - 1)
        num_groups = math.prod(mesh.values()) // size
        total += num_groups * parts / size * sum(each.array_bytes) * each.runs
    return total


def measure(config: str, overrides: Sequence[str], num_rounds: int) -> dict[str, float]:
    """Times steps on all processes; returns the median time, the mean bytes, and the loss of the last one."""
    peers, run = current_peers(), load_run(config, overrides)
    collectives, mesh = crossing_collectives(run)
    expected_bytes = sent_bytes(collectives, mesh)
    step = jaxinfra_step(run)
    assert isinstance(step.step, jax.stages.Wrapped)
    with step.context():
        step.step = step.step.lower(*step.state, step.batch).compile()
    peers.gather(None)  # the first collective waits 30 s for the other process, which may compile for longer
    step.time()  # connects
    peers.gather(None)  # all that was sent has arrived
    before = bytes_on_link()
    times_s = [step.time() for _ in range(num_rounds)]
    peers.gather(None)
    after = bytes_on_link()
    assert isinstance(step.output, dict)
    return {
        "step_s": median(times_s),
        "sent_bytes": (after - before) / num_rounds,
        "expected_bytes": expected_bytes,
        "collectives": sum(len(each.array_bytes) * each.runs for each in collectives),
        "loss": float(step.output["loss"]),
    }


def main() -> None:
    """Measures in the process of a slice what its only argument says in JSON."""
    index, config, overrides, num_rounds = json.loads(sys.argv[1])
    use_cache()
    coordinator = f"{address_of(0)}:{_PORT}"
    join(Processes(coordinator=coordinator, count=SLICES, index=index, local_devices=None, source="bench slices"))
    print(json.dumps(measure(config, overrides, num_rounds)))


if __name__ == "__main__":
    main()
