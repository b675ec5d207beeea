"""Measures what trackers add to a step: `python -m tests.track.step_cost`.

A step waits for 5 ms, as for a device, and every tenth step logs twelve metrics, as by default. Prints the median time
of `log`, and the processor time of all threads a step, less that without a tracker: a step waits at most that long for
Python's lock. Processor time does not depend on what else the machine does.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jaxinfra.track.base import Tracker
from jaxinfra.track.config import Mlflow, TrackConfig, Wandb
from jaxinfra.track.tracker import make_trackers
from tests.servers.guard import free_ports
from tests.servers.mlflow import mlflow_server

STEPS, LOG_EVERY = 4000, 10
METRICS = {name: 1.25 for name in ("loss", "loss_mean", "lr", "grad_norm", "tokens_per_s", "mfu", "step_time_s")}
METRICS |= {name: 2.5e9 for name in ("data_wait_s", "rss_bytes", "device_in_use_bytes", "device_peak_bytes", "aux")}
OFF = {"jsonl": False, "tensorboard": False, "console": "off"}


@contextmanager
def started(config: TrackConfig, folder: Path) -> Iterator[Tracker]:
    folder.mkdir()
    with make_trackers(config, folder) as trackers:
        trackers.start({"config": {"a": 1}}, {}, start_step=0, total_steps=STEPS)
        time.sleep(10)  # importing a client and connecting take seconds, once
        yield trackers
        trackers.log_summary({"status": "finished"})


def measure(tracker: Tracker) -> tuple[float, float]:
    """Returns the median seconds of a call of `log`, and the processor seconds of a step."""
    calls, start_s = [], time.process_time()
    for step in range(1, STEPS + 1):
        time.sleep(5e-3)
        if step % LOG_EVERY == 0:
            call_s = time.perf_counter()
            tracker.log(step, METRICS)
            calls.append(time.perf_counter() - call_s)
    return statistics.median(calls), (time.process_time() - start_s) / STEPS


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(mlflow_server(folder))
        configs = {
            "none": TrackConfig(**OFF),
            "metrics.jsonl": TrackConfig(**{**OFF, "jsonl": True}),
            "TensorBoard": TrackConfig(**{**OFF, "tensorboard": True}),
            "W&B, offline": TrackConfig(**OFF, wandb=Wandb(project="p", mode="offline")),
            "MLflow": TrackConfig(**OFF, mlflow=Mlflow(uri=server)),
            "MLflow, dead server": TrackConfig(**OFF, mlflow=Mlflow(uri=f"http://127.0.0.1:{free_ports(1)[0]}")),
        }
        without_s = measure(Tracker())[1]
        for number, (name, config) in enumerate(configs.items()):
            with started(config, folder / str(number)) as tracker:
                call_s, step_s = measure(tracker)
            added_s = step_s - without_s
            print(f"{name:20} log() {1e6 * call_s:6.1f} us, a step {1e6 * added_s:+6.1f} us", flush=True)


if __name__ == "__main__":
    main()
