"""Saves a state again and again, and prints the resident memory after each save as JSON."""

import json
import sys

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.track.memory import process_metrics
from tests.checkpoint.states import make_mesh, make_state


def main(folder: str, saves: int) -> None:
    state, found = make_state(make_mesh()), []
    with CheckpointManager(folder, CheckpointConfig(save_every=1)) as checkpoints:
        for step in range(1, saves + 1):
            checkpoints.save(step, state, {"step": step})
            checkpoints.wait_until_finished()
            found.append(process_metrics())
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
