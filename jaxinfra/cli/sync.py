"""`python -m launch runs sync RUN`: sends MLflow what it lacks of a run that has ended; uses no devices."""

import argparse

from jaxinfra.config import read_record
from jaxinfra.errors import ConfigError
from jaxinfra.run_dir import RunDirectory
from jaxinfra.track.config import Mlflow
from jaxinfra.track.runs import record_of
from jaxinfra.track.tracker import mlflow_tracker


def run(options: argparse.Namespace) -> None:
    """Sends the rows that are missing, and how the run ended; owns the run, so that no start sends them, too."""
    location = options.run_dir.rstrip("/")
    record = read_record(record_of(location))
    config = Mlflow(**record["config"].get("track", {}).get("mlflow", {}))
    if config.uri is None:
        fix = "set track.mlflow.uri at its next start; wandb sync sends the files of W&B"
        raise ConfigError(f"{location}: has no track.mlflow.uri, where its metrics would go; {fix}")
    run_dir = RunDirectory(location)
    with run_dir.owned():
        mlflow_tracker(config, run_dir.path, run_dir.location).sync(record, run_dir.summary())
