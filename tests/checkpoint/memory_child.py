"""Saves a state again and again, and prints the resident memory after each save as JSON."""

import gc
import json
import sys

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.machine.host_memory import keep_freed_memory
from jaxinfra.track.memory import process_metrics
from tests.checkpoint.states import make_mesh, make_state


def main(folder: str, saves: int) -> None:
    keep_freed_memory()  # as a run on one CPU device does: each thread with a heap of its own fragments it
    state, found = make_state(make_mesh()), [process_metrics() for _ in range(saves)]
    with CheckpointManager(folder, CheckpointConfig(save_every=1)) as checkpoints:
        for step in range(1, saves + 1):
            checkpoints.save(step, state, {"step": step})
            checkpoints.wait_until_finished()
            gc.collect()  # frees the tuples and floats that Python keeps to use again, a growing number at first
            found[step - 1].update(process_metrics())
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
