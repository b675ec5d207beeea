"""From the start of a process to the end of its first training step, as a user would wait for it.

One side is `python -m launch CONFIG`, whole: config, data store, run directory, checkpoints, trackers. The other is
the bare step as a script. Both find their compiled programs in a cache of their own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxinfra.bench import children


def first_step_s(command: Sequence[str], environment: dict[str, str], log: Path) -> float:
    """Seconds until the command prints a line that begins with "step"; it is killed then. Without one: a ChildError."""
    start_s = time.perf_counter()
    with (
        log.open("w") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                took_s = time.perf_counter() - start_s
                process.kill()
                return took_s
    raise children.ChildError(command, log.read_text())


def start(config: str, overrides: Sequence[str], pairs: int) -> children.Times:
    """Seconds to the first step, on one device, in turns; the first turn of each fills its cache and is dropped."""
    times_s: children.Times = {"jaxinfra": [], "bare": []}
    sizes = children.asked("measure", 1, kind="sizes", config=config, overrides=[*overrides], pairs=1)
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as name:
        folder, data = Path(name), f"data.store={name}/store"
        prepare = [sys.executable, "-m", "launch", "data", "prepare", config, *overrides, data]
        children.output(prepare, children.environment(1))
        for turn in range(pairs + 1):
            # A run of its own each time: a second start would go on with the first.
            launch = [config, *overrides, f"root={folder / str(turn)}", data, "track.log_every=1"]
            commands = {"jaxinfra": ["launch", *launch], "bare": ["jaxinfra.bench.bare", json.dumps(sizes)]}
            for side, words in commands.items():
                cache = {"JAX_COMPILATION_CACHE_DIR": os.fspath(folder / f"compiled-{side}")}
                command = [sys.executable, "-m", *words]
                took_s = first_step_s(command, children.environment(1) | cache, folder / "log")
                if turn:
                    times_s[side].append(took_s)
    return times_s
