"""Sends a run to an MLflow tracking server."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Any, override

from jaxinfra.track.base import RunStatistics
from jaxinfra.track.config import Mlflow
from jaxinfra.track.formatting import flatten, statistics_markdown
from jaxinfra.track.goodput import GOODPUT_FILE, read_ledger
from jaxinfra.track.remote import Point, RemoteRun, Row, remote_id

_MAX_PARAMS, _MAX_METRICS, _MAX_CHARS = 100, 1000, 6000  # MLflow's limits of a request, and of a value
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "interrupted": "FAILED"}
_KEY = "jaxinfra_key"  # the tag that finds a run whose id a kill has kept from us


class MLflowRun(RemoteRun):
    """A run of an MLflow experiment; `mlflow.json` in the run directory keeps its id."""

    def __init__(self, config: Mlflow, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # of the client itself, to its makers
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # `RemoteTracker` tries again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow import MlflowClient, entities

        config, self._metric = self._config, entities.Metric
        self._client = client = MlflowClient(config.uri)
        found = client.get_experiment_by_name(config.experiment)
        experiment = client.create_experiment(config.experiment) if found is None else found.experiment_id
        tags = dict(tag.split("=", 1) for tag in config.tags)
        tags["mlflow.note.content"] = statistics_markdown(statistics)  # shown as the description
        begin_ms = next((round(1000 * each.start_s) for each in read_ledger(self._run_dir / GOODPUT_FILE)), None)

        def create(key: str) -> str:
            found = client.search_runs([experiment], f"tags.{_KEY} = '{key}'", max_results=1)
            run = found[0] if found else client.create_run(experiment, begin_ms, tags | {_KEY: key}, self._run_dir.name)
            return run.info.run_id

        self._run_id = run_id = remote_id(self._run_dir / "mlflow.json", f"{config.uri} {experiment}", create)
        known = client.get_run(run_id).data.params  # MLflow refuses to change them, as a resume on another mesh would
        params = {key: str(value)[:_MAX_CHARS] for key, value in flatten(record["config"]).items() if key not in known}
        for some in batched(params.items(), _MAX_PARAMS):
            client.log_batch(run_id, params=[entities.Param(*each) for each in some])
        client.update_run(run_id, status="RUNNING")
        return f"{config.uri}/#/experiments/{experiment}/runs/{run_id}"

    @override
    def points(self) -> Iterator[Point]:
        for name in self._client.get_run(self._run_id).data.metrics:
            for each in self._client.get_metric_history(self._run_id, name):
                yield name, each.step, each.value

    @override
    def send(self, rows: Sequence[Row]) -> None:
        metrics = (
            self._metric(name, value, row.time_ms, row.step) for row in rows for name, value in row.metrics.items()
        )
        for some in batched(metrics, _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=some)
        for row in rows:
            for name, text in row.texts.items():  # a tag: a server may have no place for files that we can write to
                self._client.set_tag(self._run_id, name, f"after step {row.step}\n{text}"[:_MAX_CHARS])

    @override
    def finish(self, status: str, summary: Mapping[str, Any], end_ms: int | None = None) -> None:
        self._client.set_terminated(self._run_id, _STATUS[status], end_ms)
