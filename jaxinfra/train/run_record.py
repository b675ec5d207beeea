"""Collects what a run writes about itself: the contents of run.json, and the metrics of summary.json."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.config import Loaded, diff, fingerprint, record
from jaxinfra.config.classes import source_of, user_classes
from jaxinfra.config.codec import encode
from jaxinfra.config.folder import loaded_files
from jaxinfra.data.interfaces import Dataset
from jaxinfra.program import Program
from jaxinfra.run import Run
from jaxinfra.run_dir import RunDirectory
from jaxinfra.runtime.devices import device_memory
from jaxinfra.runtime.environment import code_digest, git_state, host_state, module_digests, package_versions
from jaxinfra.runtime.peak_flops import peak_flops
from jaxinfra.runtime.peers import Peers
from jaxinfra.track.formatting import flatten
from jaxinfra.train.guard import Decision, with_decisions
from jaxinfra.user_code import user_modules

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
"""The packages whose versions decide the numbers of a run."""

_FIELDS_OF_A_HOST = ("store", "recipe", "threads", "prefetch_bytes", "compile_cache")  # may differ between processes


def find_peak(run_dir: RunDirectory, compute: str) -> dict[str, Any]:
    """Returns the peak FLOP/s of a device of this process, its source and what it holds for.

    The peak of a CPU is measured, which varies; a resumed run keeps the first one, so that its MFU does not jump.

    Args:
        run_dir: the directory of the run, with the peak of its first start.
        compute: dtype of the matrix multiplications.
    """
    device, dtype, count = jax.local_devices()[0], jnp.dtype(compute), len(jax.local_devices())
    holds_for = {"device_kind": device.device_kind, "local_devices": count, "dtype": dtype.name}
    known = run_dir.existing_record().get("peak")
    if isinstance(known, dict) and known.get("holds_for") == holds_for:
        return known
    flops, source = peak_flops(device, dtype, count)
    return {"flops": flops, "source": source, "holds_for": holds_for}


def start_record(
    loaded: Loaded[Run], program: Program, dataset: Dataset, *, command: Sequence[str], decisions: Sequence[Decision]
) -> dict[str, Any]:
    """Returns what decides the numbers of a run: config, data, versions, decisions to go back, devices and host."""
    devices = {
        "count": len(jax.devices()),
        "kind": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "processes": jax.process_count(),
        "mesh": dict(program.mesh.shape),
        **device_memory({"memory_bytes": "bytes_limit"}),
    }
    # The run record names the data's versions and what was left out, so that a replay, or sampling, does the same.
    run = replace(loaded.run, data=loaded.run.data.with_versions(dataset.versions))
    origins = {change.path: "newest at the start" for change in diff(loaded.run, run)}
    if decisions:
        skip_batches = with_decisions(run.train.skip_batches, decisions)
        run = replace(run, train=replace(run.train, skip_batches=skip_batches))
        origins["train.skip_batches"] = "decided by the guard"
    with_versions = replace(loaded, run=run, origins=loaded.origins | origins)
    versions, git = package_versions(PACKAGES), git_state(Path(__file__).parent)
    return {
        **record(with_versions, command=command, versions=versions, git=git, devices=devices),
        "fingerprint": fingerprint(loaded.run),
        "data": dataset.fingerprint,
        "data_versions": [*dataset.versions],
        "skip_batches": loaded.run.train.skip_batches,  # without those of the decisions
        "decisions": [each._asdict() for each in decisions],
        "host": host_state(),
    }


def require_equal_processes(peers: Peers, loaded: Loaded[Run], dataset: Dataset) -> None:
    """Raises ConfigError if the processes of the run differ in what decides its numbers."""
    if peers.count == 1:
        return
    fields = flatten(encode(loaded.run))
    peers.require_equal(
        {path: str(value) for path, value in fields.items() if path.rpartition(".")[2] not in _FIELDS_OF_A_HOST}
        | {
            "the data": dataset.fingerprint,
            "the code of jaxinfra": code_digest(Path(__file__).parents[1]),
            **package_versions(PACKAGES),
            "the device": jax.local_devices()[0].device_kind,
            "the number of devices": jax.local_device_count(),
        }
    )
    digests = user_code_digests(loaded.run)
    everywhere = set[str].intersection(*map(set, peers.gather([*digests])))  # some import more, for plots
    peers.require_equal({name: digests[name] for name in sorted(everywhere)})


def user_code_digests(run: Run) -> dict[str, str]:
    """Returns a hash of each module of the user that has been imported, and of each file with a class of the config."""
    files = user_modules() | loaded_files() | {cls.__module__: source_of(cls)["file"] for cls in user_classes(run)}
    return module_digests(files)


def summary_of_metrics(rows: Sequence[dict[str, float]], modality: str, wall_s: float) -> dict[str, Any]:
    """Returns the entries of summary.json that come from the rows of metrics.jsonl.

    `wall_s` are the seconds of this start; `time_s` of a row counts from the first start of the run.
    """
    losses = [row.get("loss_mean", row["loss"]) for row in rows if "loss" in row]
    return {
        "modality": modality,
        "wall_s": max([wall_s, *(row.get("time_s", 0.0) for row in rows[-1:])]),
        "final_loss": losses[-1] if losses else None,
        f"{modality}s_per_s_median": _median(rows, f"{modality}s_per_s"),
        "mfu_median": _median(rows, "mfu"),
        "peak_rss_bytes": max((int(row["rss_bytes"]) for row in rows if "rss_bytes" in row), default=None),
    }


def _median(rows: Sequence[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return median(values) if values else None
