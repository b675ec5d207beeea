"""One of the two processes of `bench slices`: trains a few steps and prints JSON with times, bytes and the loss.

It runs on a host of a `SlowLink`. Expected bytes are those of the collectives in its compiled program.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import numpy as np

from jaxinfra.bench.measure import jaxinfra_step, load_run
from jaxinfra.bench.parity import make_program
from jaxinfra.bench.slow_link import address_of, bytes_on_link
from jaxinfra.machine.checked_programs import use_cache
from jaxinfra.plan.collectives import ALL_REDUCE_SLICE, Collective, find_collectives
from jaxinfra.plan.hlo import HloModule
from jaxinfra.processes.discovery import Processes
from jaxinfra.processes.join import join
from jaxinfra.processes.peers import current_peers
from jaxinfra.run import Run

_PORT = 8476
# How often an array goes around the ring of its devices: to be summed, and to share the sums (gloo/allreduce.cc).
_ROUNDS = {"all-reduce": 2, ALL_REDUCE_SLICE: 2, "all-gather": 1}


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
    step.time()  # compiles and connects
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
    """Measures the task that the only argument describes as JSON."""
    index, count, config, overrides, num_rounds = json.loads(sys.argv[1])
    use_cache()
    coordinator = f"{address_of(0)}:{_PORT}"
    join(Processes(coordinator=coordinator, count=count, index=index, local_devices=None, source="bench slices"))
    print(json.dumps(measure(config, overrides, num_rounds)))


if __name__ == "__main__":
    main()
