"""Times the start of a process up to the end of its first training step.

jaxinfra starts as a user would start it, `python -m launch CONFIG`: config, data store, checkpoints, trackers. The
baseline is a script. Each has a compilation cache of its own.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from jaxinfra.bench.measure import baseline_config
from jaxinfra.bench.subprocesses import Times, command_error, emulated_env, prepared_store, started
from jaxinfra.bench.table import time_rounds
from jaxinfra.config import load
from jaxinfra.run import Run


def first_step_s(command: Sequence[str], env: Mapping[str, str], log: Path) -> float:
    """Starts a command, kills it when it prints a line that begins with "step", and returns the seconds until then."""
    start_s = time.perf_counter()
    with started(command, env, log) as process:
        for line in process.stdout or ():
            if line.startswith("step"):
                return time.perf_counter() - start_s
    raise command_error(command, log.read_text())


def time_startup(config: str, overrides: Sequence[str], num_rounds: int) -> Times:
    """Times the first step of both sides on one device; a first round fills the compilation caches."""
    baseline = json.dumps(asdict(baseline_config(load(config, overrides, root=Run).run)))
    with prepared_store(config, overrides) as folder:

        def start(side: str, number: int) -> float:
            # A new run directory each time, else the second start would resume the first run.
            places = [f"root={folder / str(number)}", f"data.store={folder}/store"]
            train = ["launch", config, *overrides, *places, "track.log_every=1"]
            module = train if side == "jaxinfra" else ["jaxinfra.bench.baseline", baseline]
            env = emulated_env(1) | {"JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled-{side}")}
            return first_step_s([sys.executable, "-m", *module], env, folder / "log")

        return time_rounds({side: partial(start, side) for side in ("jaxinfra", "baseline")}, num_rounds)
