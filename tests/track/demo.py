"""A run that only logs, to be started as `python -c` with a real terminal, pipe or full disk behind it."""

import subprocess
import sys
from pathlib import Path

import jaxinfra

ROOT = Path(jaxinfra.__file__).parents[1]

RUN = """
import sys, time
from pathlib import Path
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.tracker import make_trackers

mode, run_dir, steps, sleep_s = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
derived = {"parameters": (12_345_678, "count"), "tokens a parameter": (20.0, "tokens / parameters")}
with make_trackers(TrackConfig(console=mode), run_dir) as trackers:
    record = {"config": {"a": {"b": 1}}, "origins": {"a.b": "command line"}}
    trackers.start(record, derived, start_step=0, total_steps=steps)
    for step in range(1, steps + 1):
        time.sleep(sleep_s)
        trackers.finish_step(step)
        metrics = dict(loss=9.0, loss_mean=3.51 - step / 100, lr=2.9e-4, grad_norm=0.81, tokens_per_s=41234.4)
        metrics["mfu"] = 0.3121
        trackers.log(step, metrics)
        if step == 20:
            trackers.log(step, {"eval/loss": 3.25, "eval/bits_per_byte": 1.5})
            trackers.log_save(step)
            print("printed by the run")
    scores, baselines = {"loss": 3.25, "bits_per_byte": 1.5}, {"bits_per_byte": {"unigram": 4.5}}
    trackers.log_summary({"status": "finished", "validation": scores, "baselines": baselines})
"""


def start(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter with captured output."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
