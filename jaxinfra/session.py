"""One start of a run: from its config to its report, on the devices that are here.

Reads from top to bottom: look at everything that can refuse (mesh, data, directory, space) before anything is
written or compiled; restore or begin; train; evaluate, save, report.
"""

import fcntl
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

import jaxinfra
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import Difference, Loaded, diff, read_record, record, validate, write_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.record import decode_record
from jaxinfra.data.batches import BatchLoader, validation_batches
from jaxinfra.data.interfaces import Dataset
from jaxinfra.data.prefetch import Prefetcher, process_rows, to_global
from jaxinfra.data.stopwatch import input_bound_warning
from jaxinfra.errors import ConfigError, Preempted, StorageError
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.program import Program, TrainState
from jaxinfra.run import Run, resolved
from jaxinfra.runtime.devices import local_devices
from jaxinfra.runtime.environment import git_state, package_versions
from jaxinfra.runtime.peak_flops import peak_flops
from jaxinfra.runtime.signals import StopRequest
from jaxinfra.storage.checks import check_space, make_writable
from jaxinfra.track.jsonl import read_json, read_metrics
from jaxinfra.track.report import write_report
from jaxinfra.track.tracker import MultiTracker, make_trackers
from jaxinfra.train.derived import Derived, derived, step_flops, units_per_step
from jaxinfra.train.evaluate import evaluate
from jaxinfra.train.loop import Hooks, Outcome, Reporter, Work, finite, fit

_log = logging.getLogger(__name__)

DATA_REMEDIES = {
    "reading": "use a store nearer to this machine, or more data.threads",
    "decoding": "use more data.threads, if there are cores for them",
    "placing": "use a smaller train.global_batch a process, or faster links to the devices",
}
"""What helps where a stage of making batches is slow."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")


class RunDirectory:
    """`ROOT/NAME`, with run.json, metrics.jsonl, summary.json, tensorboard/, checkpoints/ and report.html."""

    def __init__(self, path: Path):
        self.path, self.record, self.report = path, path / "run.json", path / "report.html"
        self.checkpoints = path / "checkpoints"

    def begun(self) -> Mapping[str, Any]:
        """The run record; where it is lost, the one that the newest checkpoint was saved with; else {}.

        A damaged run record is a ConfigError, a damaged one of a checkpoint a CheckpointError.
        """
        if self.record.exists():
            return read_record(self.record)
        if not self.checkpoints.exists():
            return {}
        with CheckpointManager(self.checkpoints, read_only=True) as checkpoints:
            step = checkpoints.latest_step()
            return {} if step is None else checkpoints.load_record(step)

    def data_versions(self, run: Run) -> Sequence[str]:
        """The versions of its stores that the run was begun on; () where it is not begun, or as another config."""
        found = self.begun()
        return found.get("data_versions", ()) if found and not self._changed(run, found) else ()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and holds it: a second start of the run is refused as long as this one goes on."""
        make_writable(self.path)
        holder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(holder)
            raise ConfigError(
                f"{self.path}: another process is training this run; wait for it, or use name=ANOTHER"
            ) from None
        try:
            yield
        finally:
            os.close(holder)

    def check(self, run: Run, data: Dataset) -> None:
        """Refuses a directory that a config with other numbers has begun, or the same one with other data."""
        found = self.begun()
        if changed := self._changed(run, found):
            first = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.path}: holds a run of another config: {first.path} is {first.left} there and {first.right} "
                f"here{more}; use name=ANOTHER, or change it back"
            )
        if found.get("data", data.fingerprint) != data.fingerprint:
            raise ConfigError(
                f"{self.path}: was begun on data with fingerprint {found['data']}, {data.name} has "
                f"{data.fingerprint}; use name=ANOTHER, or the version that it was begun on"
            )

    def _changed(self, run: Run, found: Mapping[str, Any]) -> list[Difference]:
        """What a record differs in from a config, of what changes the numbers."""
        before = decode_record(self.record, dict(found), Run, ClassFinder.of(run))
        return diff(before, run, fingerprinted_only=True)


def train(loaded: Loaded[Run], *, command: Sequence[str], prepare_hint: str) -> dict[str, Any]:
    """Starts a run or goes on with it, to its end; Preempted says that it was asked to stop, and its state is saved.

    The record has the command line; `prepare_hint` is the command that would make the data, for the error when it is
    missing. The summary is as in summary.json; of a run that was finished before, that of its end.
    """
    validate(loaded.run)
    devices = local_devices()
    run = resolved(loaded.run, len(devices))
    validate(run)
    program = Program(run, make_mesh(run.mesh, devices))
    directory = RunDirectory(Path(run.root) / run.name)
    data = program.data.with_versions(directory.data_versions(loaded.run)).open(hint=prepare_hint)
    data.check(run.model)
    data.validation()  # refuses data without any

    with (
        StopRequest() as stop,
        directory.locked(),
        CheckpointManager(directory.checkpoints, run.checkpoint) as checkpoints,
    ):
        done = checkpoints.latest_step() or 0
        if done:
            directory.check(loaded.run, data)
        if done >= run.train.steps:
            return _finished_before(directory, done)
        needed_bytes = checkpoints.needed_bytes(program.state)
        fix = "use root=FOLDER on another disk, or a smaller checkpoint.keep_last"
        check_space(directory.path, needed_bytes, purpose="saving checkpoints", fix=fix)
        numbers = derived(program, data.train_units)
        written = _record(loaded, program, data, command, numbers)
        write_record(directory.record, written)
        with make_trackers(run.track, directory.path) as trackers:
            trackers.start(written, numbers, start_step=done, total_steps=run.train.steps)
            session = _Session(program, data, checkpoints, trackers, stop, written)
            start_s = time.monotonic()
            outcome = session.run(done)
            checkpoints.wait_until_finished()
            summary = session.summary(outcome, time.monotonic() - start_s, directory)
            trackers.log_summary(summary)
    write_report(directory.path)
    if outcome.stopped is not None:
        raise Preempted(
            f"{directory.path}: stopped by {outcome.stopped} after step {outcome.done} of {run.train.steps}, saved; "
            "start the same command to go on"
        )
    return summary


def _finished_before(directory: RunDirectory, done: int) -> dict[str, Any]:
    """The summary of a run that has nothing left to do."""
    summary = directory.path / "summary.json"
    found = read_json(summary) if summary.exists() else {}
    if directory.record.exists() and not directory.report.exists():
        write_report(directory.path)
    return {**found, "steps": done, "status": "finished before"}


def _record(
    loaded: Loaded[Run], program: Program, data: Dataset, command: Sequence[str], numbers: Derived
) -> dict[str, Any]:
    devices = {
        "count": len(jax.devices()),
        "kind": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "processes": jax.process_count(),
        "mesh": dict(program.mesh.shape),
    }
    git = git_state(Path(jaxinfra.__file__).parent)
    # A record names the versions that it is of: who replays it, or samples from the run, reads those.
    run = replace(loaded.run, data=loaded.run.data.with_versions(data.versions))
    newest = {each.path: "newest at the start" for each in diff(loaded.run, run)}
    pinned = replace(loaded, run=run, origins=loaded.origins | newest)
    written = record(pinned, command=command, versions=package_versions(PACKAGES), git=git, devices=devices)
    written |= {"data": data.fingerprint, "data_versions": [*data.versions]}
    return {**written, "derived": {n: list(v) for n, v in numbers.items()}}


class _Session:
    """What the loop needs from the parts of a run, bound together."""

    def __init__(
        self,
        program: Program,
        data: Dataset,
        checkpoints: CheckpointManager,
        trackers: MultiTracker,
        stop: StopRequest,
        written: dict[str, Any],
    ):
        self.program, self.run_config, self.data = program, program.run, data
        self.checkpoints, self.trackers, self.stop, self.written = checkpoints, trackers, stop, written
        self.shardings = {name: array.sharding for name, array in program.validation_batch.items()}
        config = self.run_config
        one = next(iter(program.batch.values()))
        self.rows = process_rows(one.sharding, one.shape)
        self.validation = validation_batches(
            program.data,
            data.validation(config.train.eval_samples),
            global_batch=config.train.global_batch,
            rows=self.rows,
        )
        self.last_eval: dict[str, float] = {}
        device, dtype = jax.devices()[0], jnp.dtype(config.precision.compute)
        self.peak, self.peak_source = peak_flops(device, dtype, len(jax.local_devices()))

    def run(self, done: int) -> Outcome:
        """Trains from `done` steps on, and saves the last state."""
        config, program = self.run_config, self.program
        with program.on_mesh:
            key = jax.random.key(config.seed)
            state = self.checkpoints.restore(done, program.state) if done else program.init(key)
            batches = BatchLoader(
                program.data,
                self.data.train,
                global_batch=config.train.global_batch,
                rows=self.rows,
                start_step=done,
                steps=config.train.steps - done,
                ids=self.data.sample_ids,
            )
            with Prefetcher(batches, self._place) as ahead:
                hooks = Hooks(
                    log=self.trackers.log,
                    due=lambda step: config.track.due(step, config.train.steps),
                    waited_s=lambda: ahead.data_wait_s,
                    evaluate=self._evaluate,
                    save=self._save,
                    stop=lambda: self.stop.reason,
                )
                work = Work(
                    modality=program.task.modality,
                    units=units_per_step(program),
                    flops=step_flops(program),
                    peak=self.peak * program.mesh.size,
                )
                start_s = time.monotonic()
                outcome = fit(program, state, done, ahead, hooks, Reporter(hooks, work))
                stages_s = {**batches.stages_s, "placing": ahead.placing.total_s}
                late = input_bound_warning(ahead.late_s, time.monotonic() - start_s, stages_s, DATA_REMEDIES)
            if late is not None:
                _log.warning("%s", late)
            self._save_last(outcome)
        return outcome

    def _save(self, done: int, state: TrainState, values: Mapping[str, jax.Array]) -> None:
        """Saves the state if it is due. A failure costs this checkpoint, not the run: the next save tries again.

        A NonFiniteError where the last step went wrong: older checkpoints stay.
        """
        if done % self.run_config.checkpoint.save_every == 0:
            finite(done - 1, values)
        try:
            self.checkpoints.save(done, state, self.written)
        except StorageError as error:
            _log.error("%s", error)

    def _save_last(self, outcome: Outcome) -> None:
        """Saves the state that the run leaves. What fails first may be the save before it, so it is tried twice."""
        try:
            self.checkpoints.save(outcome.done, outcome.state, self.written, force=True)
        except StorageError as error:
            _log.error("%s", error)
            self.checkpoints.save(outcome.done, outcome.state, self.written, force=True)

    def _place(self, batch: Any) -> dict[str, jax.Array]:
        return to_global(batch, self.shardings, global_batch=self.run_config.train.global_batch)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        self.last_eval = evaluate(self.program, state, self.validation, self._place)
        return self.last_eval

    def summary(self, outcome: Outcome, wall_s: float, directory: RunDirectory) -> dict[str, Any]:
        """The final values of the run, from its own metrics."""
        rows = read_metrics(directory.path / "metrics.jsonl") if self.run_config.track.jsonl else []
        losses, units = [row["loss"] for row in rows if "loss" in row], f"{self.program.task.modality}s"
        return {
            "status": "finished" if outcome.stopped is None else "stopped",
            "steps": outcome.done,
            "modality": self.program.task.modality,
            units: outcome.done * units_per_step(self.program),
            "wall_s": max([wall_s, *(row["time_s"] for row in rows[-1:])]),  # over all starts of the run
            "final_loss": losses[-1] if losses else None,
            "validation": {name.removeprefix("eval/"): score for name, score in self.last_eval.items()},
            # Of all validation samples: there are none of a part of them.
            "baselines": self.data.baselines if self.run_config.train.eval_samples is None else {},
            f"{units}_per_s_median": _median(rows, f"{units}_per_s"),
            "mfu_median": _median(rows, "mfu"),
            "peak_flops_per_device": self.peak,
            "peak_source": self.peak_source,
            "peak_rss_bytes": max((int(row["rss_bytes"]) for row in rows if "rss_bytes" in row), default=None),
            "checkpoint": str(directory.checkpoints / str(outcome.done)),
            "report": str(directory.report),
        }


def _median(rows: Sequence[dict[str, float]], name: str) -> float | None:
    found = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return median(found) if found else None
