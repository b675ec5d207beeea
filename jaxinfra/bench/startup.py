"""Times the start of a process up to the end of its first training step.

jaxinfra starts as a user would start it, `python -m launch CONFIG`: config, data store, checkpoints, trackers. The
baseline is a script. Each has a compilation cache of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jaxinfra.bench.measure import baseline_config
from jaxinfra.bench.subprocesses import Times, command_error, emulated_env, run_command
from jaxinfra.config import load
from jaxinfra.run import Run


def first_step_s(command: Sequence[str], env: Mapping[str, str], log: Path) -> float:
    """Starts a command, kills it when it prints a line that begins with "step", and returns the seconds until then."""
    start_s = time.perf_counter()
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                elapsed_s = time.perf_counter() - start_s
                process.kill()
                return elapsed_s
    raise command_error(command, log.read_text())


def time_startup(config: str, overrides: Sequence[str], num_rounds: int) -> Times:
    """Times the first step of both sides on one device; a first round fills the compilation caches."""
    times_s: Times = {"jaxinfra": [], "baseline": []}
    baseline = json.dumps(asdict(baseline_config(load(config, overrides, root=Run).run)))
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as name:
        folder, store = Path(name), f"data.store={name}/store"
        prepare = ["launch", "data", "prepare", config, *overrides, store]
        run_command([sys.executable, "-m", *prepare], emulated_env(1))
        for round_number in range(num_rounds + 1):
            # A new run directory each time, else the second start would resume the first run.
            train = ["launch", config, *overrides, f"root={folder / str(round_number)}", store, "track.log_every=1"]
            for side, module in {"jaxinfra": train, "baseline": ["jaxinfra.bench.baseline", baseline]}.items():
                env = emulated_env(1) | {"JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled-{side}")}
                elapsed_s = first_step_s([sys.executable, "-m", *module], env, folder / "log")
                if round_number > 0:
                    times_s[side].append(elapsed_s)
    return times_s
