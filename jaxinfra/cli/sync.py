"""`python -m launch runs sync RUN`: sends MLflow what it lacks of a run that has ended; uses no devices."""

import argparse
from dataclasses import dataclass

from jaxinfra.command import command_line
from jaxinfra.config import apply, decode, read_record, validate
from jaxinfra.errors import ConfigError
from jaxinfra.run_dir import RunDirectory
from jaxinfra.track.config import Mlflow, TrackConfig
from jaxinfra.track.runs import record_of
from jaxinfra.track.tracker import mlflow_tracker


@dataclass(frozen=True, kw_only=True)
class _Tracked:
    """The part of a run that overrides may change."""

    track: TrackConfig


def run(options: argparse.Namespace) -> None:
    """Sends the rows that are missing, and how the run ended; owns the run, so that no start sends them, too."""
    location = options.run_dir.rstrip("/")
    record = read_record(record_of(location))
    recorded = decode(Mlflow, record["config"].get("track", {}).get("mlflow", {}))
    validate(tracked := apply(_Tracked(track=TrackConfig(mlflow=recorded)), options.overrides))
    config = tracked.track.mlflow
    if config.uri is None:
        again = command_line("runs", "sync", location, "track.mlflow.uri=http://127.0.0.1:5000")
        fix = f"name the server, as in {again}; wandb sync sends the files of W&B"
        raise ConfigError(f"{location}: has no track.mlflow.uri, where its metrics would go; {fix}")
    run_dir = RunDirectory(location)
    with run_dir.owned():
        mlflow_tracker(config, run_dir.path, run_dir.location).sync(record, run_dir.summary())
