"""A training while it runs: what it opens, how it goes on from a checkpoint, and what it does after a step.

`train` opens what lasts from the first step of a start to its last one: the lease of the run directory, the watchdog,
the compile cache, the checkpoints. A `Training` is the steps from a checkpoint on; if the guard goes back to an earlier
checkpoint, the next `Training` begins there.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import jax

from jaxinfra.config import Difference, fingerprint, write_record
from jaxinfra.data.prefetch import Prefetcher
from jaxinfra.errors import (
    ConfigError,
    CorruptionError,
    JaxinfraError,
    NonFiniteError,
    PeerLostError,
    Preempted,
)
from jaxinfra.failpoints import failpoint
from jaxinfra.inference.trained_params import load_params, weights_digest, with_base
from jaxinfra.machine.compile_cache import compile_cache
from jaxinfra.processes import maintenance
from jaxinfra.processes.requests import RunSignals
from jaxinfra.processes.step_file import round_number
from jaxinfra.program import Metrics, TrainState
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.track.goodput import GOODPUT_FILE
from jaxinfra.track.planned import CHECKED_STEPS, WARM_STEPS, Terms, measure, read_plan, verdict
from jaxinfra.track.runs import parse_source
from jaxinfra.track.tracker import MultiTracker, make_trackers
from jaxinfra.train.cadence import Cadence
from jaxinfra.train.due import Due, Save
from jaxinfra.train.duration import keep_step_time, time_statistic
from jaxinfra.train.energy import Energy
from jaxinfra.train.evaluation import evaluate, evaluated_params
from jaxinfra.train.guard import Rewind
from jaxinfra.train.job import Job
from jaxinfra.train.loop import Loop
from jaxinfra.train.memory_check import check_step, out_of_memory_errors
from jaxinfra.train.numerics import Numerics
from jaxinfra.train.profiler import Profiler
from jaxinfra.train.reference_values import fill_references, reference_key
from jaxinfra.train.replay import Replay
from jaxinfra.train.reporting import Reporting
from jaxinfra.train.run_record import (
    existing_metrics,
    find_peak,
    finished_before,
    make_summary,
    start_record,
    sync_finished,
)
from jaxinfra.train.saving import Restored, Saving
from jaxinfra.train.skipped import SkippedSamples
from jaxinfra.train.statistics import run_statistics
from jaxinfra.train.waiting import Waiting, input_bound_warning
from jaxinfra.train.watch import Watch

_log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """How a training has ended."""

    summary: dict[str, Any]  # the contents of summary.json
    step: int  # number of completed steps
    state: TrainState | None = None  # the train state after them; None if an earlier start has made all steps
    reason: str | None = None  # why the training has stopped before the last step; None if it has made that step


class Opened(NamedTuple):
    """Holds the parts that stay open from the first step of a start to its last one, also if the run goes back."""

    requests: RunSignals  # says when to stop, or to save and go on
    watch: Watch  # ends the training if it hangs
    profiler: Profiler  # profiles some of the steps
    saving: Saving  # saves and restores checkpoints and copies of the state
    numerics: Numerics  # checks losses and parameters, and keeps the decisions to go back
    peak: Mapping[str, Any]  # FLOP/s of one device, and where that number is from
    changes: Sequence[Mapping[str, Any]]  # the changes of the config between the starts of the run, for the run record
    plan: Terms | None  # with which process 0 compares the steps


def train(job: Job) -> Ended:
    """Trains from the newest checkpoint of the run directory, or from the start, to the last step, and saves it.

    On a request to stop it saves the state, and the reason is in what it returns.
    """
    run, run_dir, peers = job.run, job.run_dir, job.peers
    plan = _plan_of(job)  # before the directory is made
    profiler = Profiler(run.profile, run_dir.path / "profile", is_active=job.is_main)
    with (
        RunSignals(peers, profile=profiler.request) as requests,
        Energy(run.track, peers) as energy,
        Watch(run.watchdog, run_dir, peers, energy) as watch,
        maintenance.listen(os.environ, lambda notice: peers.request("stop", notice)),
        profiler,
        compile_cache(run.train.compile_cache, exact_lines=run.profile.at is not None),
        run_dir.owned() if job.is_main else nullcontext() as owned,
        ExitStack() as before_owned_ends,  # closes the ledger while this process still owns the directory
        Saving(job.program, run_dir, peers, owned) as saving,
    ):
        run_dir.require_shared()
        changed: Sequence[Difference] = ()
        if peers.broadcast(saving.checkpoints.all_steps()):
            changed = run_dir.check(job.loaded.run, job.data.dataset, accept_change=job.accept_change)
        newest = saving.checkpoints.newest(saving.checkpoints.manifest)
        step, record = (0, {}) if newest is None else (newest[0], newest[1].record)
        if step > run.train.steps or (step == run.train.steps and not lacks_evaluation(job, step, record)):
            summary = peers.broadcast(finished_before(job, step) if job.is_main else None)
            if job.is_main:
                sync_finished(job, summary)  # which the others need not wait for
            return Ended(summary, step)
        if job.is_main:
            saving.check_space()
            before_owned_ends.callback(watch.ledger.close)
            planned = {}
            if plan is not None and plan.joules is not None and plan.devices == job.program.mesh.size:
                planned["planned_joules"] = plan.joules
            watch.ledger.open(run_dir.path / GOODPUT_FILE, peers.count, **planned)
        peak = peers.broadcast(find_peak(run_dir, run.precision.compute) if job.is_main else None)
        before = peers.broadcast(run_dir.existing_record() if job.is_main else None)
        numerics = Numerics(job.program, watch.phases)
        numerics.read_decisions(before)
        if job.is_main:
            numerics.warn_of_few_copies()
        changes = [*before.get("changes", ()), *([_accepted(job, changed, step)] if changed else ())]
        saving.open_copies(is_new=not before)
        opened = Opened(requests, watch, profiler, saving, numerics, peak, changes, plan)
        with peers.naming_causes(), job.program.on_mesh, out_of_memory_errors(job):
            while True:
                trackers = MultiTracker()  # logs nothing: only process 0 does
                if owned is not None:
                    trackers = make_trackers(run.track, run_dir.path, run_dir.location, owned.check)
                with trackers:
                    training = Training(job, opened, trackers, step)
                    try:
                        return training.run()
                    except Rewind as rewind:
                        step = go_back(job, opened, rewind)
                    except CorruptionError as error:
                        raise left_by_devices(job, opened, error) from None


def go_back(job: Job, opened: Opened, rewind: Rewind) -> int:
    """Decides to which checkpoint the run goes back, and returns its step.

    Raises NonFiniteError if the run has gone back to that checkpoint before.
    """
    checkpoints = opened.saving.checkpoints
    checkpoints.wait_until_finished()
    opened.saving.forget_copies()
    to = job.peers.broadcast(max(checkpoints.all_steps(), default=0))
    if to >= rewind.step:  # the evaluation came after the save, in another start
        raise NonFiniteError(f"{rewind}; delete {job.run_dir.checkpoints}/{to} to go on from an older checkpoint")
    decision = opened.numerics.go_back(rewind, to)
    if job.is_main:
        _log.warning("%s; going back to step %d, without the batches %d to %d", rewind, to, *decision.skip)
    return to


def left_by_devices(job: Job, opened: Opened, error: CorruptionError) -> JaxinfraError:
    """Returns the error with which this process ends, at the same time as the others, after one that names devices.

    In an elastic run only the hosts of such devices end for good; all others start again without them.
    """
    try:
        opened.saving.checkpoints.wait_until_finished()
    except JaxinfraError as problem:  # it must not hide the device
        _log.warning("%s", problem)
    opened.saving.forget_copies()
    newest = job.peers.broadcast(max(opened.saving.checkpoints.all_steps(), default=0))
    line = f"{error}; its step is not saved, the newest checkpoint is {newest or 'none'}"
    if round_number() and job.peers.index not in error.processes:
        return PeerLostError(f"{line}; the other hosts go on without this one")
    return CorruptionError(f"{line}; test this device, then start the same command without it")


def lacks_evaluation(job: Job, step: int, record: Mapping[str, Any]) -> bool:
    """Whether a request to stop has cut off the evaluation after a step, and no later start has made it.

    `step` is that of the newest checkpoint, with which `record` was saved.
    """
    if record.get("evaluated", True):
        return False
    rows = [row for row in existing_metrics(job.run_dir) if row["step"] == step] if job.is_main else []
    return not job.peers.broadcast(any(name.startswith("eval/") for row in rows for name in row))


def preempted(job: Job, reason: str, step: int) -> Preempted:
    """Returns the error of a training that was asked to stop."""
    where, steps = job.run_dir.location, f"step {step} of {job.run.train.steps}"
    return Preempted(f"{where}: stopped by {reason} after {steps}, saved; start the same command to go on")


def _accepted(job: Job, changed: Sequence[Difference], step: int) -> Mapping[str, Any]:
    """Returns a change of the config for the run record, and warns of it in process 0."""
    fields = {each.path: [mask_credentials(str(side)) for side in (each.left, each.right)] for each in changed}
    if job.is_main:
        listed = ", ".join(f"{path} from {old} to {new}" for path, (old, new) in fields.items())
        _log.warning("%s: goes on with another config: %s", job.run_dir.location, listed)
    return {"step": step, "fields": fields}


def _plan_of(job: Job) -> Terms | None:
    """Reads the plan of a run in process 0, if it has one; ConfigError if that fails, of an old run only a warning."""
    path = job.run.track.plan
    if path is None or not job.is_main:
        return None
    try:
        return read_plan(path)
    except ConfigError as error:
        if not job.run_dir.existing_record():
            raise ConfigError(f"track.plan={error}") from None
        _log.warning("track.plan=%s; the steps are not compared with it", error)
        return None


class Training:
    """The steps from a checkpoint, or from the start of the run, to the last one.

    `newest_step` is the step of the newest checkpoint, 0 without one.

    Attributes:
        loop: makes the steps, and has the train state.
    """

    def __init__(self, job: Job, opened: Opened, trackers: MultiTracker, newest_step: int) -> None:
        self._job, self._opened, self._trackers = job, opened, trackers
        self._saving, self._numerics, self._phases = opened.saving, opened.numerics, opened.watch.phases
        dataset, owned = job.data.dataset, opened.saving.owned
        statistics = run_statistics(job.program, dataset.train_units, len(dataset.train))
        with self._phases("restore" if newest_step or job.run.init else "init"):
            restored, init_source = self._restore_or_init(newest_step)
        fill_references(job, init_source, self._phases, restored.state.params if restored.step == 0 else None)
        step = restored.step
        self._phases.resume(step)
        self._is_evaluated = not lacks_evaluation(job, step, restored.record)
        self._complete_step = opened.saving.checkpoints.complete_step  # of the save that the trackers know
        self._eval_metrics: Mapping[str, float] = {}
        self._eval_step = -1  # completed steps at the last evaluation
        started = start_record(job, opened.numerics.decisions, opened.peak, statistics, opened.changes)
        self._record = {"init": init_source, **self._saving.record, **started}
        if owned is not None:
            owned.check()
            write_record(job.run_dir.record, self._record)
        record = self._record | ({"resumed_from": restored.source} if restored.source else {})
        time_left = time_statistic(job.program, job.run.train.steps - step) if job.is_main else {}
        trackers.start(record, {**statistics, **time_left}, start_step=step, total_steps=job.run.train.steps)
        self._batches = job.data.training_batches(self._numerics.train_config, step)
        self._skipped = SkippedSamples(
            job.run_dir.path, job.peers, self._batches, start_step=step, is_on=job.run.data.on_damage == "skip"
        )
        self._reporting = Reporting(
            job, opened.watch, opened.numerics, trackers, peak_flops=opened.peak["flops"], skipped=self._skipped.metrics
        )
        self._reporting.interval.resume(restored.record)
        self._plan = opened.plan
        self._cadence = Cadence(job.run.checkpoint, step, job.program.mesh.size, job.peers.broadcast)
        replay = None
        if job.run.guard.replay_every is not None and job.program.mesh.size > 1:
            replay = Replay(job.program, job.peers, self._phases, trackers.log_note).step
        elif job.run.guard.replay_every is not None:
            _log.warning("guard.replay_every: there is one device, so no step is computed again on another one")
        self.loop = Loop(
            job,
            restored.state,
            step,
            self._reporting,
            opened.profiler,
            Waiting(self._reporting),
            self._cadence,
            opened.requests,
            check_owner=owned.lease.check if owned is not None else lambda: None,
            after_step=self._after_step,
            save=lambda: self._save(None, "asked"),
            replay=replay,
            leaves=self._leaves,
        )
        self._sample()  # a prompt that cannot be used is an error now, not at the first evaluation

    def run(self) -> Ended:
        """Makes the steps, saves the last one, and writes the summary. Raises Rewind if the guard goes back."""
        job, loop, start_s = self._job, self.loop, time.monotonic()
        reason = self._make_steps()
        if reason is not None:
            self._opened.watch.settle(reason, preempted(job, reason, loop.completed_steps))
        self._phases.enter("end")
        failpoint("end", loop.completed_steps)
        summary = None
        if job.is_main:
            wall_s = time.monotonic() - start_s
            mean, peak = self._reporting.interval.mean_loss, self._opened.peak
            summary = make_summary(job, loop.completed_steps, reason, wall_s, self._eval_metrics, peak, mean)
            keep_step_time(job.program, self._phases.median_step_s())
        summary = job.peers.broadcast(summary)
        self._trackers.log_summary(summary)
        return Ended(summary, loop.completed_steps, loop.state, reason)

    def _make_steps(self) -> str | None:
        """Makes the steps and saves the last one; returns the reason to stop before it, or None."""
        if not self._is_evaluated:
            self._is_evaluated = self._evaluate()
        self._phases.enter("step")
        if self._phases.resumes == 1:  # else the run has gone back, and its steps have fitted
            with self._phases("compile"):
                check_step(self._job)
                self._reporting.stragglers.begin(self.loop.completed_steps, self._job.run.train.steps)
        loop, reporting, last_step = self.loop, self._reporting, self._job.run.train.steps
        with Prefetcher(self._batches, self._job.data.place) as on_devices:
            start_s = time.monotonic()
            reason = loop.run(on_devices.poll, last_step)
            reporting.finish()
            self._finish_profile()
            if loop.completed_steps == last_step and self._is_evaluated:
                reason = None
            wait_s, total_s = reporting.data_wait_s - loop.waiting.first_s, time.monotonic() - start_s
            with self._phases("save"):
                self._save(None, "asked")  # before the prefetcher is closed: a read of it may hang
                self._saving.checkpoints.wait_until_finished()
                self._tell_saved()
                self._saving.forget_copies()
            stages_s = {**self._batches.stage_times_s, "transfer": on_devices.transfer_time.total_s}
        if (warning := input_bound_warning(wait_s, total_s, stages_s)) is not None:
            _log.warning("%s", warning)
        return reason

    # After a step

    def _after_step(self, due: Due, metrics: Metrics) -> None:
        """Does what is due after the last step but to log it, which is one step late (`Reporting`)."""
        if due.profile:
            self._finish_profile()
        self._is_evaluated = not due.evaluation or self._evaluate()
        if due.replicas:
            self._numerics.replicas.check(self.loop.completed_steps, self.loop.state)
        with self._phases("step" if due.save is None else "save"):
            stalled_s = self._phases.seconds()["save"]
            saved = self._save(metrics, due.save)
        if due.save in ("asked", "checkpoint"):
            step_s, stall_s = self._phases.median_step_s(), self._phases.seconds()["save"] - stalled_s
            line = self._cadence.measured(self.loop.completed_steps, stall_s, step_s, saved=saved)
            if line is not None:
                self._trackers.log_note(self.loop.completed_steps, line)
        if self._plan is not None:
            self._check_plan(self._plan)

    def _check_plan(self, plan: Terms) -> None:
        """Says once in a line whether the steps are as planned."""
        steps = self.loop.completed_steps - (self._phases.start_step or 0)
        if steps in (WARM_STEPS + 1, CHECKED_STEPS):  # a step is reported one late
            self._opened.watch.ledger.write()
        if steps == CHECKED_STEPS and (found := measure(self._job.run_dir.path)) is not None:
            self._trackers.log_note(self.loop.completed_steps, f"plan: {verdict(found, plan)}")

    def _save(self, metrics: Metrics | None, what: Save | None) -> bool:
        """Saves a checkpoint or a copy of the state; with None, only reports a save that has failed meanwhile.

        Returns whether it has saved a checkpoint.

        A failed save is only logged unless somebody has asked for it (see `Saving`). Given the metrics of the last
        step, it raises NonFiniteError instead of saving a state that is not finite.
        """
        step, state = self.loop.completed_steps, self.loop.state
        if what is not None:
            if self._numerics.guard.skipped and what != "asked":
                return False  # if the run goes back, it must be to a checkpoint from before the skipped steps
            self._skipped.collect(step)  # before the checkpoint: a resume does not repeat its steps
            if metrics is not None:
                self._numerics.require_finite(step, metrics)
            self._numerics.check_before_save(step, state)
        history = {"guard": self._numerics.guard.history, "interval": self._reporting.interval.history}
        record = self._record | history | {"evaluated": self._is_evaluated}
        new = self._eval_metrics if self._eval_step == step else {}
        new = {name.removeprefix("eval/"): value for name, value in new.items()}
        saved = self._saving.save(step, state, record, what, metrics=new)
        if saved:
            self._trackers.log_save(step)
        self._tell_saved()
        return saved

    def _tell_saved(self) -> None:
        """Tells the trackers of a checkpoint that is complete, if there is a new one."""
        complete_step = self._saving.checkpoints.complete_step
        if complete_step is not None and complete_step != self._complete_step:
            self._complete_step = complete_step
            self._trackers.log_saved(complete_step)

    def _leaves(self) -> str | None:
        """Returns why the training leaves after this checkpoint, in all processes alike; None if it goes on."""
        if not round_number():
            return None
        is_asked = self._job.peers.broadcast(self._job.step_writer.is_asked_to_leave)
        return "its supervisor (more hosts are there)" if is_asked else None

    def _stops(self) -> bool:
        """Whether the run stops after the last completed step, and all processes know it."""
        return all(self._job.peers.gather(self._opened.requests.stop_is_due(self.loop.completed_steps)))

    def _evaluate(self) -> bool:
        """Evaluates and logs the metrics; returns False if a request to stop came first: the next start evaluates."""
        job, step, state = self._job, self.loop.completed_steps, self.loop.state
        with self._phases("evaluation"):
            metrics = evaluate(job, state, step, self._phases, stops=self._stops)
            if metrics is None or (job.run.train.eval_tasks and self._stops()):
                return False
            if job.run.train.eval_tasks:
                metrics |= job.texts.scores(evaluated_params(state))
            metrics |= self._skipped.of_evaluation(job.data.validation, step)
            self._eval_metrics, self._eval_step = metrics, step
            self._trackers.log(step, metrics)
        text = self._sample()
        self._reporting.interval.pause()
        self._numerics.check_evaluation(step, metrics)
        if text is not None:
            self._trackers.log_sample(step, text)
        return True

    def _sample(self) -> str | None:
        """Returns `track.sample_prompt` with the model's continuation; None without a prompt."""
        if self._job.texts.prompt is None:
            return None
        with self._phases("sample"):
            return self._job.texts.sample(evaluated_params(self.loop.state))

    def _finish_profile(self) -> None:
        """Ends the profile, if there is one, and logs its text."""
        with self._phases("profile"):
            text = self._opened.profiler.finish(self.loop.completed_steps, self.loop.state)
        if text is not None:
            self._reporting.interval.pause()
            self._trackers.log_profile(self.loop.completed_steps, text)

    # At the start

    def _restore_or_init(self, newest_step: int) -> tuple[Restored, dict[str, Any] | None]:
        """Restores the newest state, else loads the parameters of `run.init`, else initializes them.

        Also returns, for the run record, the run and step of `run.init` that the first parameters came from.
        """
        job, numerics = self._job, self._numerics
        before = job.peers.broadcast(job.run_dir.existing_record() if job.is_main else None)
        identity = {  # decides the state after a step: it must not have changed since a copy was saved
            "config": fingerprint(job.loaded.run),
            "data": job.data.dataset.fingerprint,
            "skip_batches": [list(each) for each in numerics.train_config.skip_batches],
        }
        if restored := self._saving.restore(newest_step, identity, before):
            numerics.resume(restored.record)
            state = with_base(restored.state, job.program, job.peers, before)
            return restored._replace(state=state), before.get("init")
        numerics.resume({})
        failpoint("init", 0)
        again = "as it has no checkpoint yet" if before else ""
        if job.run.init is None:
            return Restored(0, job.program.init(jax.random.key(job.run.seed)), {}, again), None
        with ExitStack() as stack:
            if (key := job.run.checkpoint.init_key) is not None:
                from jaxinfra.registry import signing  # imports only what this run has named

                stack.enter_context(signing.reading_verified(job.run.init, key, option="checkpoint.init_key"))
            loaded = load_params(job.run.init, job.program, job.peers)
        path, _ = parse_source(job.run.init)
        init_source = {"run": path, "step": loaded.step, "fingerprint": loaded.fingerprint}
        if job.run.adapter is not None:
            init_source["weights"] = weights_digest(job.program, loaded.params)
        if getattr(job.run.data, "cached_reference", False):
            init_source["reference"] = reference_key(job, loaded.params)
        return Restored(0, job.program.init_from(loaded.params), {}, again), init_source
