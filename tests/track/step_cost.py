"""Measures what trackers add to a step: `python -m tests.track.step_cost`.

A step waits for 5 ms, as for a device. Every tenth step logs twelve metrics, as by default. Blocks of steps with and
without a tracker alternate. Prints the median time of the call, and what a step takes longer: the mean over the middle
half of the blocks.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jaxinfra.track.base import Tracker
from jaxinfra.track.config import MLflow, TrackConfig, Wandb
from jaxinfra.track.tracker import make_trackers
from tests.servers.guard import free_ports
from tests.servers.mlflow import mlflow_server

BLOCKS, STEPS, LOG_EVERY = 40, 100, 10
METRICS = {name: 1.25 for name in ("loss", "loss_mean", "lr", "grad_norm", "tokens_per_s", "mfu", "step_time_s")}
METRICS |= {name: 2.5e9 for name in ("data_wait_s", "rss_bytes", "device_in_use_bytes", "device_peak_bytes", "aux")}
OFF = {"jsonl": False, "tensorboard": False, "console": "off"}


@contextmanager
def started(config: TrackConfig, folder: Path) -> Iterator[Tracker]:
    folder.mkdir()
    with make_trackers(config, folder) as trackers:
        trackers.start({"config": {"a": 1}}, {}, start_step=0, total_steps=BLOCKS * STEPS)
        time.sleep(10)  # importing a client and connecting take seconds, once
        yield trackers
        trackers.log_summary({"status": "finished"})


def added_s(tracker: Tracker) -> tuple[float, float]:
    """Returns the seconds that a tracker adds to a step: of its call, and in all."""
    blocks: dict[bool, list[float]] = {False: [], True: []}
    calls = []
    for block in range(2 * BLOCKS):
        logs, start_s = bool(block % 2), time.perf_counter()
        for step in range(STEPS):
            time.sleep(5e-3)
            if logs and step % LOG_EVERY == 0:
                call_s = time.perf_counter()
                tracker.log(block // 2 * STEPS + step, METRICS)
                calls.append(time.perf_counter() - call_s)
        blocks[logs].append((time.perf_counter() - start_s) / STEPS)
    middle = slice(BLOCKS // 4, -BLOCKS // 4)
    with_tracker, without = (statistics.mean(sorted(blocks[logs])[middle]) for logs in (True, False))
    return statistics.median(calls), with_tracker - without


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(mlflow_server(folder))
        configs = {
            "none": TrackConfig(**OFF),
            "metrics.jsonl": TrackConfig(**{**OFF, "jsonl": True}),
            "TensorBoard": TrackConfig(**{**OFF, "tensorboard": True}),
            "W&B, offline": TrackConfig(**OFF, wandb=Wandb(project="p", mode="offline")),
            "MLflow": TrackConfig(**OFF, mlflow=MLflow(uri=server)),
            "MLflow, dead server": TrackConfig(**OFF, mlflow=MLflow(uri=f"http://127.0.0.1:{free_ports(1)[0]}")),
        }
        for number, (name, config) in enumerate(configs.items()):
            with started(config, folder / str(number)) as tracker:
                call_s, step_s = added_s(tracker)
            print(f"{name:20} log() {1e6 * call_s:7.1f} us, step {1e6 * step_s:+7.1f} us", flush=True)


if __name__ == "__main__":
    main()
