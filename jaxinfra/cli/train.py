"""`python -m launch CONFIG [KEY=VALUE ...]`: train, on the devices of this machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxinfra.cli import config_argument
from jaxinfra.session import train
from jaxinfra.track.curve import curve
from jaxinfra.track.jsonl import read


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Trains to the end, or says that there is nothing left to do."""
    command = ["python", "-m", "launch", *argv]
    loaded = config_argument.loaded(options)
    summary = train(loaded, command=command, prepare_hint=config_argument.prepare_hint(options, loaded.run))
    if summary["status"] == "finished before":
        print(f"nothing to do: all {summary['steps']} steps are done, {summary.get('checkpoint', 'saved')}")
    elif loaded.run.track.console != "off":
        print_losses(Path(summary["report"]).with_name("metrics.jsonl"))
    return 0


def print_losses(metrics: Path) -> None:
    """Draws the training loss of a run that has logged any."""
    losses = [(int(row["step"]), row["loss"]) for row in read(metrics) if "loss" in row] if metrics.exists() else []
    if losses:
        print("Training loss")
        print(curve([(step + 1, loss) for step, loss in losses]))
