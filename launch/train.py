"""`python -m launch CONFIG [KEY=VALUE ...]`: train, on the devices of this machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch import config_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    config_argument.add(parser)


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Trains to the end, or says that there is nothing left to do."""
    from jaxinfra.session import train
    from jaxinfra.track.curve import curve
    from jaxinfra.track.jsonl import read

    command = ["python", "-m", "launch", *argv]
    overrides = " ".join(o for o in options.overrides if o.startswith("data."))
    hint = f"python -m launch prepare {options.config} {overrides}".strip()
    summary = train(config_argument.loaded(options), command=command, prepare_hint=hint)
    metrics = Path(summary.get("report", "")).with_name("metrics.jsonl")
    if summary["status"] == "finished" and metrics.exists():
        losses = [(int(row["step"]), row["loss"]) for row in read(metrics) if "loss" in row]
        print("Training loss")
        print(curve([loss for _, loss in losses], steps=(losses[0][0] + 1, losses[-1][0] + 1)))
    if summary["status"] == "finished before":
        print(f"nothing to do: all {summary['steps']} steps are done, {summary.get('checkpoint', 'saved')}")
    return 0
