"""Collects what a run writes about itself: the contents of run.json, and the metrics of summary.json."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.config import Loaded, diff, fingerprint, record, write_record
from jaxinfra.config.classes import source_of, user_classes
from jaxinfra.config.codec import encode
from jaxinfra.config.folder import LOADED_FILES
from jaxinfra.data.interfaces import Dataset
from jaxinfra.errors import JaxinfraError
from jaxinfra.machine.environment import code_digest, git_state, host_state, module_digests, package_versions
from jaxinfra.machine.peak_flops import peak_flops
from jaxinfra.processes.devices import device_memory
from jaxinfra.processes.peers import Peers
from jaxinfra.run import Run
from jaxinfra.run_dir import RunDirectory
from jaxinfra.storage.errors import storage_errors
from jaxinfra.track.audit import record_trained
from jaxinfra.track.base import RunStatistics
from jaxinfra.track.formatting import flatten, shown_metrics
from jaxinfra.track.jsonl import JsonlTracker, read_metrics
from jaxinfra.track.report import REPORT_FILE, write_report
from jaxinfra.track.tracker import mlflow_tracker
from jaxinfra.train.guard import Decision, with_decisions
from jaxinfra.train.job import Job
from jaxinfra.train.statistics import units_per_step
from jaxinfra.user_code import user_modules

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
"""The packages whose versions decide the numbers of a run."""

_log = logging.getLogger(__name__)
_FIELDS_OF_A_HOST = ("store", "recipe", "threads", "prefetch_bytes", "compile_cache")  # may differ between processes


def find_peak(run_dir: RunDirectory, compute: str) -> dict[str, Any]:
    """Returns the peak FLOP/s of a device of this process, its source and what it holds for.

    The peak of a CPU is measured, which varies; a resumed run keeps the first one, so that its MFU does not jump.
    `compute` is the dtype of the matrix multiplications.
    """
    device, dtype, count = jax.local_devices()[0], jnp.dtype(compute), len(jax.local_devices())
    holds_for = {"device_kind": device.device_kind, "local_devices": count, "dtype": dtype.name}
    known = run_dir.existing_record().get("peak")
    if isinstance(known, dict) and known.get("holds_for") == holds_for:
        return known
    flops, source = peak_flops(device, dtype, count)
    return {"flops": flops, "source": source, "holds_for": holds_for}


def start_record(
    job: Job,
    decisions: Sequence[Decision],
    peak: Mapping[str, Any],
    statistics: RunStatistics,
    changes: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns the contents of run.json, except for where the state came from.

    `decisions` are those of the guard to go back to a checkpoint, `changes` those of the config between starts, `peak`
    is as of `find_peak`.
    """
    loaded, dataset = job.loaded, job.data.dataset
    devices = {
        "count": len(jax.devices()),
        "kind": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "processes": jax.process_count(),
        "mesh": dict(job.program.mesh.shape),
        **device_memory({"memory_bytes": "bytes_limit"}),
    }
    # The record names the data's versions and the skipped batches, so that a replay, or sampling, takes the same ones.
    run = replace(loaded.run, data=loaded.run.data.with_versions(dataset.versions))
    origins = {change.path: "newest at the start" for change in diff(loaded.run, run)}
    if decisions:
        skip_batches = with_decisions(run.train.skip_batches, decisions)
        run = replace(run, train=replace(run.train, skip_batches=skip_batches))
        origins["train.skip_batches"] = "decided by the guard"
    resolved = replace(loaded, run=run, origins=loaded.origins | origins)
    versions, git = package_versions(PACKAGES), git_state(Path(__file__).parent)
    return {
        **record(resolved, command=job.command, versions=versions, git=git, devices=devices),
        "fingerprint": fingerprint(loaded.run),
        "data": dataset.fingerprint,
        "data_versions": [*dataset.versions],
        "skip_batches": loaded.run.train.skip_batches,  # without those of the decisions
        "decisions": [each._asdict() for each in decisions],
        "host": host_state(),
        "peak": peak,
        "derived": {name: list(value) for name, value in statistics.items()},
        "baselines": job.data.baselines,
        "changes": changes,
    }


def require_equal_processes(peers: Peers, loaded: Loaded[Run], dataset: Dataset) -> None:
    """Raises ConfigError if the processes of the run differ in what decides its numbers."""
    if peers.count == 1:
        return
    peers.require_equal(
        equal_fields(loaded.run)
        | {
            "the data": dataset.fingerprint,
            "the code of jaxinfra": code_digest(Path(__file__).parents[1]),
            **package_versions(PACKAGES),
            "the device": jax.local_devices()[0].device_kind,
            "the number of devices": jax.local_device_count(),
        }
    )
    peers.require_equal(user_code_digests(loaded.run, peers))


def equal_fields(run: Run) -> dict[str, str]:
    """Returns the fields of a config that all processes must have alike, by their paths."""
    fields = flatten(encode(run))
    return {path: str(value) for path, value in fields.items() if path.rpartition(".")[2] not in _FIELDS_OF_A_HOST}


def user_code_digests(run: Run, peers: Peers) -> dict[str, str]:
    """Returns a hash of each module of the user that all processes have imported, or that has a class of the config."""
    files = user_modules() | LOADED_FILES | {cls.__module__: source_of(cls)["file"] for cls in user_classes(run)}
    digests = module_digests(files)
    everywhere = set[str].intersection(*map(set, peers.gather([*digests])))  # some import more, for plots
    return {name: digests[name] for name in sorted(everywhere)}


def existing_metrics(run_dir: RunDirectory) -> list[dict[str, float]]:
    """Returns the logged metrics of a run, one row per logged step; [] before the first."""
    return read_metrics(run_dir.metrics) if run_dir.metrics.exists() else []


def make_summary(
    job: Job,
    completed_steps: int,
    reason: str | None,
    wall_s: float,
    eval_metrics: Mapping[str, float],
    peak: Mapping[str, Any],
    loss: float | None = None,
) -> dict[str, Any]:
    """Returns the contents of summary.json.

    `reason` is why the run has stopped before its last step, None if it has made that step. `wall_s` are the seconds of
    this start. `eval_metrics` are those of the last evaluation, as "eval/NAME", and `peak` is as of `find_peak`.
    `loss` is the mean of the steps since the last logged one, if there are any.
    """
    rows, modality = existing_metrics(job.run_dir), job.run.data.modality  # such as "token"
    losses = [shown_metrics(row)["loss"] for row in rows if "loss" in row]
    logged_s = rows[-1].get("time_s", 0.0) if rows else 0.0  # of all starts, unlike `wall_s`
    return {
        "status": "finished" if reason is None else "stopped",
        "steps": completed_steps,
        "modality": modality,
        "wall_s": max(wall_s, logged_s),
        "final_loss": losses[-1] if loss is None and losses else loss,
        f"{modality}s_per_s_median": _median(rows, f"{modality}s_per_s"),
        "mfu_median": _median(rows, "mfu"),
        "peak_rss_bytes": max((int(row["rss_bytes"]) for row in rows if "rss_bytes" in row), default=None),
        f"{modality}s": completed_steps * units_per_step(job.program),
        "validation": {name.removeprefix("eval/"): value for name, value in eval_metrics.items()},
        "baselines": job.data.baselines,
        "peak_flops_per_device": peak["flops"],
        "peak_source": peak["source"],
        "checkpoint": f"{job.run_dir.checkpoints}/{completed_steps}",
        "report": f"{job.run_dir.location}/{REPORT_FILE}",
    }


def finished_before(job: Job, completed_steps: int) -> dict[str, Any]:
    """Returns the summary of a run that is finished; writes it, run.json and the audit record, if it is not there."""
    run_dir = job.run_dir
    record = run_dir.existing_record()
    if not run_dir.record.exists() and record:  # the newest checkpoint has it, too
        write_record(run_dir.record, record)
    if run_dir.record.exists() and run_dir.summary().get("status") != "finished":
        rows = existing_metrics(run_dir)
        evaluated = next((row for row in reversed(rows) if "eval/loss" in row), {})
        evaluated = {name: value for name, value in evaluated.items() if name.startswith("eval/")}
        peak = {"flops": math.nan, "source": "", **record.get("peak", {})}
        summary = make_summary(job, completed_steps, None, 0.0, evaluated, peak)
        if job.run.track.audit is not None:
            record_trained(job.run.track.audit, run_dir.location, record, summary)
        with storage_errors(run_dir.path):
            JsonlTracker(run_dir.path).log_summary(summary)
        write_report(run_dir.path)
    if run_dir.record.exists() and not run_dir.report.exists() and not run_dir.is_remote:
        write_report(run_dir.path)
    return {**run_dir.summary(), "steps": completed_steps, "status": "finished before"}


def sync_finished(job: Job, summary: Mapping[str, Any]) -> None:
    """Sends MLflow what it lacks of a run that is finished; warns if that fails."""
    run_dir = job.run_dir
    if (config := job.run.track.mlflow).uri is not None:
        tracker = mlflow_tracker(config, run_dir.path, run_dir.location)
        try:
            tracker.sync(run_dir.existing_record(), {**summary, "status": "finished"})
        except JaxinfraError as error:
            _log.warning("%s", error)


def _median(rows: Sequence[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return median(values) if values else None
