"""`python -m launch model promote RUN --to models:/NAME --if RULES`: puts a run in use if its evaluation passes."""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxinfra.cli.evaluate import evaluate, print_result
from jaxinfra.command import command_line
from jaxinfra.config import read_record
from jaxinfra.errors import ConfigError
from jaxinfra.interop.folder import is_published
from jaxinfra.registry.gate import parse_policy, shortfalls
from jaxinfra.registry.promotion import described, promote
from jaxinfra.registry.versions import Registry, Version
from jaxinfra.storage import audit
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.storage.location import is_remote
from jaxinfra.tasks.harness import is_standard_error
from jaxinfra.track.runs import parse_source, record_of


def run(options: argparse.Namespace) -> None:
    """Evaluates in all processes; process 0 moves the alias. What is wrong with the gate is found before."""
    if is_published(options.run_dir):
        raise ConfigError(f"{options.run_dir}: is no run; name one whose checkpoint is promoted, such as runs/story")
    rules = parse_policy(options.gate)
    location, _ = parse_source(options.run_dir)
    record = read_record(record_of(location))
    track = (record.get("config") or {}).get("track") or {}
    registry = open_registry(options.registry, options.to, track)
    registry.champion()  # it answers
    result = evaluate(options)
    if not options.prints:
        return
    print_result(result)
    place = location.rstrip("/") if is_remote(location) else str(Path(location).resolve())
    candidate = Version(
        source=f"{place}@{result['step']}",
        checkpoint=result["checkpoint"],
        data=_data(result, options),
        metrics=_metrics(result),
    )
    shortfalls(rules, candidate.metrics, None)  # a metric that is not there, before the registry is asked
    found = promote(registry, candidate, rules, f"{place.rpartition('/')[0]}/registry/{registry.model}")
    print(f"{registry.target}: {described(found)}")
    if where := track.get("audit"):
        entry = audit.append(
            where, "promoted", registry.target, version=found.number, **candidate.tags(), gate=options.gate
        )
        print(f"{where}: entry {entry.number}, {entry.digest}")
    if found.replaced:
        words = ["--from", found.number, *(["--registry", options.registry] * bool(options.registry))]
        back = command_line("model", "rollback", registry.target, *words)
        print(mask_credentials(f"it was version {found.replaced}; go back with {back}"))


def open_registry(uri: str | None, target: str, track: Mapping[str, Any] | None = None) -> Registry:
    """Returns the model of a registry: that of the option, of the run's tracker, or of MLflow's own variables."""
    of_run = (track or {}).get("mlflow") or {}
    found = uri or of_run.get("uri") or os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    if not found:
        fix = "add --registry http://HOST:5000, or set MLFLOW_TRACKING_URI"
        raise ConfigError(f"{target}: which registry? The run does not name one; {fix}")
    return Registry(found, target)


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation by the names of rules: eval/loss, or TASK/METRIC."""
    if "tasks" not in result:
        return {f"eval/{name}": float(value) for name, value in result["validation"].items()}
    return {
        f"{task}/{name}": float(value)
        for task, metrics in result["tasks"].items()
        for name, value in metrics.items()
        if name != "samples" and not is_standard_error(name) and isinstance(value, int | float)
    }


def _data(result: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Returns what must be equal for two evaluations to be comparable."""
    if "tasks" not in result:
        return f"{result['data']}/{result['samples']}"
    samples = {task: metrics.get("samples") for task, metrics in result["tasks"].items()}
    how = [samples, options.num_fewshot, options.chat, options.template, options.system, version("lm-eval")]
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()
