"""Lists the checkpoints of a run with their health, verifies them, and decides which to delete. Imports no JAX."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxinfra.checkpoint.bucket_steps import BucketSteps
from jaxinfra.checkpoint.config import CheckpointConfig, Metrics
from jaxinfra.checkpoint.disk_steps import DiskSteps
from jaxinfra.checkpoint.manifest import DamageError, Manifest
from jaxinfra.checkpoint.step_store import Leftover, StepStore, step_health
from jaxinfra.config.codec import decode
from jaxinfra.storage.location import is_remote


@dataclass(frozen=True, kw_only=True)
class StepOverview:
    """A checkpoint.

    Attributes:
        step: number of completed steps.
        problems: what is wrong with it; empty if its manifest is sound and its files have the right lengths.
        num_bytes: of its files; None if the manifest cannot be read.
        age_s: seconds since it was saved; None if the manifest cannot be read.
        metrics: of the evaluation after this step.
        is_kept: whether the config of the run keeps it; damaged ones are neither kept nor deleted.
    """

    step: int
    problems: Sequence[str] = ()
    num_bytes: int | None = None
    age_s: float | None = None
    metrics: Metrics = field(default_factory=dict)
    is_kept: bool = True


def stored_checkpoints(run: str) -> StepStore:
    """Returns the checkpoints of a run directory or URL, as files."""
    if is_remote(run):
        return BucketSteps(f"{run.rstrip('/')}/checkpoints")
    return DiskSteps(Path(run, "checkpoints"))


def retention_of(record: Mapping[str, Any]) -> CheckpointConfig:
    """Returns which checkpoints the config in a run record keeps; the defaults without a record."""
    return decode(CheckpointConfig, record.get("config", {}).get("checkpoint", {}))


def list_checkpoints(stored: StepStore, config: CheckpointConfig) -> list[StepOverview]:
    """Returns the steps, ascending; reads manifests and lengths only."""
    found = {step: health for step in stored.steps() if (health := step_health(stored, step)) is not None}
    intact = {step: manifest.metrics for step, (manifest, problems) in found.items() if manifest and not problems}
    deleted = {*config.superseded(intact)}
    return [
        StepOverview(step=step, problems=problems, is_kept=step not in deleted, **_about(manifest))
        for step, (manifest, problems) in found.items()
    ]


def _about(manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {}
    age_s = time.time() - datetime.fromisoformat(manifest.saved).timestamp()
    return {"num_bytes": manifest.num_bytes, "age_s": age_s, "metrics": manifest.metrics}


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Holds the result of comparing every byte of a step with its hash."""

    step: int  # number of completed steps
    num_files: int = 0  # that have a hash
    num_bytes: int = 0  # that were read
    problems: Sequence[str] = ()  # what is wrong, one for each damaged file
    is_gone: bool = False  # whether the step was deleted in the meantime, by the run or by a person


def verify_step(
    stored: StepStore, step: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verified:
    """Compares every byte of a step with its hash; `progress` is told the bytes that were read, and all."""
    manifest, done, problems = None, 0, dict[str, str]()
    try:
        manifest = stored.manifest(step)
        for name, num_bytes, damage in stored.compare(step, manifest):
            done += num_bytes
            progress(done, manifest.num_bytes)
            if damage is not None:
                problems.setdefault(name, str(damage))
    except DamageError as damage:
        problems[""] = str(damage)
    if problems and not stored.still_has(step, manifest):
        return Verified(step=step, is_gone=True)
    num_files = 0 if manifest is None else len(manifest.files)
    return Verified(step=step, num_files=num_files, num_bytes=done, problems=[*problems.values()])


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Names what to delete."""

    steps: Mapping[int, int]  # the superseded steps, with their bytes
    leftovers: Sequence[Leftover]  # what interrupted saves have left, and damaged steps that were set aside
    damaged: Mapping[int, str]  # steps that are neither counted nor deleted, with what is wrong
    kept: Sequence[int]  # the intact steps that are left

    @property
    def num_bytes(self) -> int:
        """Bytes that are freed, as far as they are known."""
        return sum(self.steps.values()) + sum(each.num_bytes or 0 for each in self.leftovers)


def plan_prune(stored: StepStore, config: CheckpointConfig, *, with_damaged: bool) -> PrunePlan:
    """Decides what to delete. If that is a step, all steps that are left are verified: none that is damaged counts."""
    damaged: dict[int, str] = {}
    manifests: dict[int, Manifest] = {}
    for step in stored.steps():
        manifest, problems = step_health(stored, step) or (None, [])
        if problems:
            damaged[step] = problems[0]
        elif manifest is not None:
            manifests[step] = manifest
    verified: set[int] = set()
    while True:
        deleted = config.superseded({step: manifest.metrics for step, manifest in manifests.items()})
        unread = [step for step in manifests if step not in deleted and step not in verified] if deleted else []
        if not unread:
            break
        for step in reversed(unread):
            verified.add(step)
            if problems := verify_step(stored, step).problems:
                damaged[step] = problems[0]
                del manifests[step]
    leftovers = [each for each in stored.leftovers() if each.kind == "incomplete" or with_damaged]
    return PrunePlan(
        steps={step: manifests[step].num_bytes for step in deleted},
        leftovers=leftovers,
        damaged=damaged,
        kept=[step for step in manifests if step not in deleted],
    )
