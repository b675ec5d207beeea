"""`python -m launch CONFIG [KEY=VALUE ...]`: trains on the devices of this machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxinfra.cli import config_argument
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.track.terminal_plot import plot_curve
from jaxinfra.train.trainer import Trainer


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Trains or resumes, and plots the loss."""
    command = ["python", "-m", "launch", *argv]
    loaded = config_argument.load_config(options)
    prepare = config_argument.prepare_command(options, loaded.run)
    summary = Trainer(loaded, command=command, prepare_command=prepare).train()
    if summary["status"] == "finished before":
        print(f"nothing to do: all {summary['steps']} steps are done, {summary.get('checkpoint', 'saved')}")
    elif loaded.run.track.console != "off":
        metrics = Path(summary["report"]).with_name("metrics.jsonl")
        rows = read_metrics(metrics) if metrics.exists() else []
        if losses := [(int(row["step"]) + 1, row["loss"]) for row in rows if "loss" in row]:
            print(f"Training loss\n{plot_curve(losses)}")
    return 0
