"""`Trainer`: trains a run on the devices of all its processes.

`Trainer(run).train()` checks the config before it writes or compiles anything. Then it restores or initializes the
state, trains, evaluates, and saves. The devices never wait for the host: metrics stay on the devices until they are
logged, and the host waits for a step only after it has dispatched the next one.

All processes of a run make the same calls. Process 0 alone writes the run directory, apart from the shards of the
checkpoints, and what it reads there it tells the others.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import Difference, Loaded, fingerprint, validate, write_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.data.batches import BatchLoader
from jaxinfra.data.interfaces import Dataset
from jaxinfra.data.prefetch import Prefetcher
from jaxinfra.data.stopwatch import DATA_REMEDIES, input_bound_warning
from jaxinfra.errors import ConfigError, NonFiniteError, Preempted
from jaxinfra.failpoints import failpoint
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.spec import Params
from jaxinfra.program import Metrics, Program, TrainState
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.run_dir import Owned, RunDirectory, join_location
from jaxinfra.runtime import maintenance
from jaxinfra.runtime.compile_cache import compile_cache
from jaxinfra.runtime.devices import all_devices, device_memory
from jaxinfra.runtime.peers import current_peers
from jaxinfra.runtime.shared_reads import read_by_first
from jaxinfra.runtime.signals import RunSignals
from jaxinfra.runtime.step_file import StepWriter
from jaxinfra.sample import Sampler
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.storage.errors import storage_errors
from jaxinfra.track.jsonl import JsonlTracker, read_metrics
from jaxinfra.track.memory import process_metrics
from jaxinfra.track.report import REPORT_FILE, write_report
from jaxinfra.track.runs import parse_source
from jaxinfra.track.tracker import MultiTracker, make_trackers
from jaxinfra.train.guard import Rewind
from jaxinfra.train.interval import Interval
from jaxinfra.train.numerics import Numerics
from jaxinfra.train.profiler import Profiler
from jaxinfra.train.run_data import RunData
from jaxinfra.train.run_record import find_peak, require_equal_processes, start_record, summary_of_metrics
from jaxinfra.train.saving import Saving
from jaxinfra.train.skipped import SkippedSamples
from jaxinfra.train.statistics import RunStatistics, run_statistics, units_per_step
from jaxinfra.train.texts import Texts
from jaxinfra.train.watch import Watch, is_busy
from jaxinfra.trained_params import load_params
from jaxinfra.user_code import user_code_errors

_log = logging.getLogger(__name__)


class _EvaluationStopped(Exception):
    """Ends an evaluation in a training that was asked to stop."""


class Trainer:
    """Trains a run.

    Attributes:
        run: the config, with the mesh sized for the devices.
        program: its compiled functions.
        run_dir: its directory.
        completed_steps: number of steps that the state was trained for.
    """

    def __init__(
        self,
        run: Run | Loaded[Run],
        *,
        command: Sequence[str] = (),
        prepare_command: str | None = None,
        accept_change: bool = False,
    ):
        """Checks the config and builds the program; reads, writes and compiles nothing yet.

        Args:
            run: a config, or the result of `config.load`.
            command: the command line, for the run record.
            prepare_command: the command that prepares the data, for the error message if the data is missing.
            accept_change: whether a run that has begun may go on with a config that changes its numbers.
        """
        if not isinstance(run, Run | Loaded):
            raise TypeError(f"expected a Run, or what jaxinfra.load returns, found {type(run).__name__}")
        self._loaded = run if isinstance(run, Loaded) else Loaded(run=run, source="python", origins={})
        validate(self._loaded.run)
        devices = all_devices()
        self._peers = current_peers()
        self.run = with_mesh_size(self._loaded.run, len(devices))
        validate(self.run)
        self._texts = Texts(self.run)
        self.program = Program(self.run, make_mesh(self.run.mesh, devices))
        self.run_dir = RunDirectory(join_location(self.run.root, self.run.name))
        self._data = RunData(self.program, self._loaded.run, self.run_dir, prepare_command)
        self._state: TrainState | None = None
        self.completed_steps = 0
        self._command, self._accept_change = list(command), accept_change
        self._changes: list[Mapping[str, Any]] = []  # of the config, between the starts of the run
        self._trackers, self._interval, self._step_writer = MultiTracker(), Interval(self.program), StepWriter()
        self._saving: Saving | None = None  # while it trains
        self._owned: Owned | None = None  # in process 0, while it trains
        self._loader: Prefetcher[dict[str, jax.Array]] | None = None
        self._batches: BatchLoader | None = None  # that the loader takes from
        self._skipped: SkippedSamples | None = None  # with `data.on_damage=skip`
        self._record: dict[str, Any] = {}
        self._eval_metrics: dict[str, float] = {}
        self._eval_step: int | None = None  # completed steps at the last evaluation
        self._is_evaluated = True  # False if a request has stopped the evaluation after the last completed step
        self._signals: RunSignals | None = None  # while `train` makes steps
        self._watch = Watch(self.run.watchdog, self.run_dir, self._peers)
        self._phases, self._stragglers = self._watch.phases, self._watch.stragglers
        self._profiler = Profiler(self.run.profile, self.run_dir.path / "profile", is_active=self._is_main)
        self._numerics = Numerics(self.program, self._phases)
        self._pending: tuple[int, Metrics] | None = None  # the step whose metrics are not reported yet
        self._peak: dict[str, Any] = {"flops": math.nan, "source": ""}  # FLOP/s of one device

    # Training

    def train(self) -> dict[str, Any]:
        """Trains to the last step and returns the summary, as in summary.json.

        Resumes from the newest checkpoint of the run directory. On a request to stop it saves the state and raises
        Preempted; the same call resumes.
        """
        with read_by_first(self._peers):
            dataset, steps = self.dataset, self.run.train.steps
        self._data.check_host_memory()
        self.require_equal_processes()
        self._texts.load()
        with (
            RunSignals() as signals,
            self._watch,
            maintenance.listen(os.environ, lambda notice: self._peers.request("stop", notice)),
            self._profiler,
            compile_cache(self.run.train.compile_cache, exact_lines=self.run.profile.at is not None),
            self.run_dir.owned() if self._is_main else nullcontext() as owned,
            ExitStack() as before_owned_ends,
            Saving(self.program, self.run_dir, self._peers, owned) as self._saving,
        ):
            self._owned, checkpoints = owned, self._saving.checkpoints
            self.run_dir.require_shared(self._peers)
            changed = []
            if self._peers.broadcast(checkpoints.all_steps()):
                changed = self.run_dir.check(self._loaded.run, dataset, accept_change=self._accept_change)
            newest = checkpoints.newest(checkpoints.manifest)
            self.completed_steps = 0 if newest is None else newest[0]
            self._is_evaluated = newest is None or newest[1].record.get("evaluated", True)
            if self.completed_steps > steps or (self.completed_steps == steps and not self._lacks_evaluation()):
                return self._peers.broadcast(self._finished_before() if self._is_main else None)
            if self._is_main:
                self._saving.check_space()
                before_owned_ends.callback(self._watch.close_ledger)
                self._watch.open_ledger()
            self._peak = self._peers.broadcast(
                find_peak(self.run_dir, self.run.precision.compute) if self._is_main else None
            )
            statistics = run_statistics(self.program, dataset.train_units)
            record = self._peers.broadcast(self.run_dir.existing_record() if self._is_main else None)
            self._numerics.read_decisions(record)
            self._changes = [*(record or {}).get("changes", ())]
            if changed:
                self._accept(changed)
            self._saving.open_copies(is_new=not record)
            reason = summary = None
            with self._peers.naming_causes(), self.program.on_mesh:
                while summary is None:  # once more if the guard goes back to a checkpoint
                    with self._make_trackers() as self._trackers:
                        reason, summary = self._train_from_checkpoint(signals, statistics)
        if reason is not None:
            raise self._preempted(reason)
        return summary

    def _preempted(self, reason: str) -> Preempted:
        steps = f"step {self.completed_steps} of {self.run.train.steps}"
        return Preempted(
            f"{self.run_dir.location}: stopped by {reason} after {steps}, saved; start the same command to go on"
        )

    def _accept(self, changed: Sequence[Difference]) -> None:
        """Records that the config has changed, and warns of it in process 0."""
        fields = {each.path: [mask_credentials(str(side)) for side in (each.left, each.right)] for each in changed}
        self._changes.append({"step": self.completed_steps, "fields": fields})
        if self._is_main:
            listed = ", ".join(f"{path} from {old} to {new}" for path, (old, new) in fields.items())
            _log.warning("%s: goes on with another config: %s", self.run_dir.location, listed)

    def _finished_before(self) -> dict[str, Any]:
        """Returns the summary of a run that is finished; writes it, and run.json, if they are not there."""
        if not self.run_dir.record.exists() and (record := self.run_dir.existing_record()):
            write_record(self.run_dir.record, record)
        if self.run_dir.record.exists() and self.run_dir.summary().get("status") != "finished":
            self._peak = self.run_dir.existing_record().get("peak", self._peak)
            evaluated = next((row for row in reversed(self.metrics) if "eval/loss" in row), {})
            self._eval_metrics = {name: value for name, value in evaluated.items() if name.startswith("eval/")}
            with storage_errors(self.run_dir.path):
                JsonlTracker(self.run_dir.path).log_summary(self._summary(None, 0.0))
            write_report(self.run_dir.path)
        return self.run_dir.finished_summary(self.completed_steps)

    def _make_trackers(self) -> MultiTracker:
        if self._owned is None:
            return MultiTracker()
        return make_trackers(self.run.track, self.run_dir.path, self.run_dir.location, self._owned.check)

    def _train_from_checkpoint(
        self, signals: RunSignals, statistics: RunStatistics
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Trains from the newest checkpoint on, or from the start, and saves.

        Returns the reason to stop before the last step, if any, and the summary; None if the guard goes back.
        """
        assert self._saving is not None
        with self._phases("restore" if self.completed_steps or self.run.init else "init"):
            self.state, init_source, source = self._restore_or_init()
        self._phases.resume(self.completed_steps)
        self._record = {"init": init_source, **self._saving.record, **self._make_record(statistics)}
        if self._owned is not None:
            self._owned.check()
            write_record(self.run_dir.record, self._record)
        record = self._record | ({"resumed_from": source} if source else {})
        self._trackers.start(record, statistics, start_step=self.completed_steps, total_steps=self.run.train.steps)
        if self.run.data.on_damage == "skip":
            self._skipped = SkippedSamples(self.run_dir.path, self._peers, self.completed_steps)
        self._sample()  # a prompt that cannot be used is an error now, not at the first evaluation
        start_s = time.monotonic()
        self._signals = signals
        try:
            reason = self._fit_dataset(signals)
        except Rewind as rewind:
            self._go_back(rewind)
            return None, None
        finally:
            self._signals = None
        if reason is not None:
            self._watch.settle(reason, self._preempted(reason))
        self._phases.enter("end")
        failpoint("end", self.completed_steps)
        wall_s = time.monotonic() - start_s
        summary = self._peers.broadcast(self._summary(reason, wall_s) if self._is_main else None)
        self._trackers.log_summary(summary)
        return reason, summary

    def _go_back(self, rewind: Rewind) -> None:
        """Decides to which checkpoint the run goes back; NonFiniteError if it has been there before."""
        assert self._saving is not None
        self._saving.checkpoints.wait_until_finished()
        self._saving.forget_copies()
        to = self._peers.broadcast(self._saving.checkpoints.latest_step()) or 0
        if to >= rewind.step:  # the evaluation came after the save, in another start
            raise NonFiniteError(f"{rewind}; delete {self.run_dir.checkpoints}/{to} to go on from an older checkpoint")
        decision = self._numerics.go_back(rewind, to)
        self.completed_steps, self._pending = to, None
        self._interval.begin_again()
        if self._is_main:
            _log.warning("%s; going back to step %d, without the batches %d to %d", rewind, to, *decision.skip)

    def fit(
        self,
        batches: Iterable[tuple[int, dict[str, jax.Array]]],
        stops_after: Callable[[int], str | None] = lambda completed_steps: None,
        saves_after: Callable[[int], str | None] = lambda completed_steps: None,
    ) -> str | None:
        """Trains until the batches end or `stops_after` returns a reason, and returns that.

        `saves_after` and then `stops_after` are called after each step with the number of completed steps; a reason to
        save saves a step that is not due. `batches` are pairs of the steps before it, from `completed_steps` on, and
        arrays on the devices. Raises NonFiniteError if the numbers go wrong, see `GuardConfig`.
        """
        assert self.state is not None
        config, reason = self.run.train, None
        self._pending = None
        failpoint("compile", self.completed_steps)
        for step, batch in batches:
            self._profiler.begin_step(step, self.state)
            with self._phases.first("train_step"):
                self.state, metrics = self.program.train_step(self.state, batch)
            self._phases.begun = step + 1
            self._peers.agreement.dispatches(step + 1)
            failpoint("step", step + 1)
            self._report_pending()  # one step late, so that the devices work while the host waits
            if self._owned is not None:
                self._owned.lease.check()
            self.completed_steps = step + 1
            self._pending = (self.completed_steps, metrics)
            evaluates = config.evaluates_after(self.completed_steps)
            profile_ends = self._profiler.ends_after(self.completed_steps)
            asked = saves_after(self.completed_steps) is not None
            saves = asked or self.run.checkpoint.due_after(self.completed_steps) is not None
            if evaluates or profile_ends or saves:  # a checkpoint has all metrics up to its step beside it
                self._report_pending()
            if profile_ends:
                self._finish_profile()
            self._is_evaluated = not evaluates or self._log_evaluation()
            self._numerics.check_after(self.completed_steps, self.state)
            with self._phases("save" if saves else "step"):
                self.save(metrics, force=asked)
            if reason := stops_after(self.completed_steps):
                break
        if (last := self._pending) is not None:
            self._report_pending()
            self._numerics.require_finite(*last)
        self._finish_profile()
        return reason if self.completed_steps < config.steps or not self._is_evaluated else None

    def _report_pending(self) -> None:
        if self._pending is not None:
            self.report(*self._pending)
            self._pending = None

    def report(self, step: int, metrics: Metrics) -> None:
        """Waits for a step, counted from 1, and logs its metrics if they are due.

        Raises NonFiniteError if the loss or the gradient is not finite, or Rewind if the guard says so.
        """
        was_ready = not is_busy(metrics["loss"])
        with self._phases("device"):
            jax.block_until_ready(metrics)
        self._phases.finish_step(step)
        self._stragglers.finish_step(step, was_ready=was_ready)
        self._interval.finish_step()
        self._trackers.finish_step(step)
        self._step_writer.complete(step)
        loss, skipped = self._numerics.look(step, metrics)
        self._interval.add(loss, skipped=skipped)
        if not self.run.track.due(step, self.run.train.steps):
            return
        values = self._numerics.require_finite(step, metrics)
        values.pop("skipped", None)  # the interval counts them
        waited_s = 0.0 if self._loader is None else self._loader.data_wait_s
        values |= self._interval.read(waited_s=waited_s, peak_flops=self._peak["flops"])
        values |= process_metrics() | device_memory() | self._watch.log()
        if self._skipped is not None:
            self._collect_skipped(step)
            values["data/skipped"] = self._skipped.count
        self._trackers.log(step, values)

    def evaluate(self) -> dict[str, float]:
        """Returns the objective's metrics over all validation samples, each counted once, as "eval/NAME".

        Evaluates the averaged parameters if the run keeps them. Sums stay on the devices until the end. In `train` the
        host waits for the batch before the last one, and leaves if the run was asked to stop.
        """
        state = self.state
        if state is None:
            raise ConfigError(f"{self.run_dir.location}: has no parameters to evaluate yet; call train() first")
        params, total, last = self._evaluated_params, None, None
        with self.program.on_mesh:
            for _, batch in self._data.validation:
                if self._signals is not None:
                    jax.block_until_ready(last)  # of the batch before the last one: the devices work meanwhile
                    self._check_stop()
                last = total
                with self._phases.first("eval_step"):
                    sums = self.program.eval_step(params, self._data.place(batch), state.reference)
                if total is None:
                    failpoint("evaluation", self.completed_steps)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        assert total is not None, "there is at least one validation sample"
        sums = {name: float(value) for name, value in jax.device_get(total).items()}
        objective = self.program.objective
        with user_code_errors(type(objective), "objective"):
            # Process 0 tells the others: counting the bytes of the text reads all validation samples.
            metrics = objective.evaluation_metrics(sums, self._data.validation.samples) if self._is_main else {}
            metrics = {f"eval/{name}": float(value) for name, value in metrics.items()}
        return self._peers.broadcast(metrics)

    def save(self, metrics: Metrics | None = None, *, force: bool = False) -> None:
        """Saves the state if a checkpoint or a copy of it is due, or always a checkpoint with `force`.

        A failed save is only logged, see `Saving`. Given the metrics of the last step, it raises NonFiniteError instead
        of saving a state that is not finite.
        """
        assert self._saving is not None and self.state is not None
        if force or self.run.checkpoint.due_after(self.completed_steps) is not None:
            if self._numerics.guard.skipped and not force:
                return  # if the run goes back, then to a checkpoint from before
            self._collect_skipped(self.completed_steps)  # before the checkpoint: a resume does not repeat its steps
            if metrics is not None:
                self._numerics.require_finite(self.completed_steps, metrics)
            self._numerics.check_before_save(self.completed_steps, self.state)
        record = self._record | {"guard": self._numerics.guard.history, "evaluated": self._is_evaluated}
        if self._saving.save(self.completed_steps, self.state, record, metrics=self._new_eval_metrics(), force=force):
            self._trackers.log_save(self.completed_steps)

    def _identity(self) -> dict[str, Any]:
        """Returns what decides the state after a step: it must not have changed since a copy was saved."""
        return {
            "config": fingerprint(self._loaded.run),
            "data": self.dataset.fingerprint,
            "skip_batches": [list(each) for each in self._numerics.train_config.skip_batches],
        }

    def _new_eval_metrics(self) -> dict[str, float]:
        """The metrics of an evaluation after the last step; {} without one."""
        if self._eval_step != self.completed_steps:
            return {}
        return {name.removeprefix("eval/"): value for name, value in self._eval_metrics.items()}

    def _collect_skipped(self, completed_steps: int) -> None:
        if self._skipped is not None and self._batches is not None:
            self._skipped.collect(self._batches, completed_steps)

    # Results

    @property
    def state(self) -> TrainState | None:
        """The train state on the devices; before `train`, the newest checkpoint, or None without one."""
        if self._state is None and self.run_dir.has_checkpoints():
            with self.program.on_mesh, CheckpointManager(self.run_dir.checkpoints, read_only=True) as checkpoints:
                if checkpoints.all_steps():
                    self.run_dir.check(self._loaded.run, self.dataset)
                if newest := checkpoints.newest(lambda step: checkpoints.restore(step, self.program.state)):
                    self.completed_steps, self._state = newest
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The logged metrics of the run, one row per logged step, as in metrics.jsonl."""
        return read_metrics(self.run_dir.metrics) if self.run_dir.metrics.exists() else []

    def sampler(self) -> Sampler:
        """Returns a sampler of the trained language model, with the averaged parameters if the run keeps them."""
        if self.state is None:
            return Sampler.from_run(self.run_dir.location, ClassFinder.from_config(self.run))
        return Sampler.from_params(self.run, self._evaluated_params)

    @property
    def _evaluated_params(self) -> Params:
        """The averaged parameters if the run keeps them; there must be a state."""
        assert self.state is not None
        return self.state.params if self.state.ema is None else self.state.ema

    # Data, checkpoints and records

    @property
    def dataset(self) -> Dataset:
        """The data of the run, opened and checked; ConfigError if it is missing or does not fit the model."""
        return self._data.dataset

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Values of simple models on the validation split, by metric; they are known for the whole split only."""
        return self._data.baselines

    @property
    def _is_main(self) -> bool:
        """Whether this is process 0, which writes the run directory."""
        return self._peers.index == 0

    def require_equal_processes(self) -> None:
        """Raises ConfigError if the processes of the run differ in what decides its numbers."""
        require_equal_processes(self._peers, self._loaded, self.dataset)

    def _restore_or_init(self) -> tuple[TrainState, dict[str, Any] | None, str]:
        """Restores the newest state, else loads the parameters of `run.init`, else initializes them.

        Returns the state; for the run record the run and step that the first parameters came from; and for people where
        it was restored from.
        """
        assert self._saving is not None
        record = self._peers.broadcast(self.run_dir.existing_record() if self._is_main else None)
        if restored := self._saving.restore(self.completed_steps, self._identity(), record):
            self.completed_steps = restored.step
            self._is_evaluated = restored.record.get("evaluated", True)
            self._numerics.resume(restored.record)
            return restored.state, record.get("init"), restored.source
        self._is_evaluated = True
        self._numerics.resume({})
        failpoint("init", 0)
        if self.run.init is None:
            return self.program.init(jax.random.key(self.run.seed)), None, ""
        loaded = load_params(self.run.init, self.program)
        path, _ = parse_source(self.run.init)
        init_source = {"run": path, "step": loaded.step, "fingerprint": loaded.fingerprint}
        return self.program.init_from(loaded.params), init_source, ""

    def _fit_dataset(self, signals: RunSignals) -> str | None:
        """Calls `fit` with the training batches of the run, from the next step on, and saves the last step."""
        config, start = self._numerics.train_config, self.completed_steps
        self._batches = batches = BatchLoader(
            self.run.data,
            self.dataset.train,
            global_batch=config.global_batch,
            rows=self._data.rows,
            start_step=start,
            steps=config.steps - start,
            sample_ids=lambda step, rows: self.dataset.sample_ids(config.batch_of_step(step), rows),
        )

        def is_over() -> bool:
            """Acts on requests while a batch is late; nothing is saved before the first step."""
            if self.completed_steps == start:
                return False
            self._report_pending()
            if signals.saves_after(self.completed_steps) is not None:
                with self._phases("save"):
                    self.save(force=True)
            return signals.stops_after(self.completed_steps) is not None

        if self._lacks_evaluation():
            self._is_evaluated = self._log_evaluation()
        self._phases.enter("step")
        with Prefetcher(
            batches,
            self._data.place,
            is_over=is_over,
            are_devices_busy=lambda: self._pending is not None and is_busy(self._pending[1]["loss"]),
            waiting=lambda: self._phases("data"),
        ) as self._loader:
            start_s = time.monotonic()
            reason = self.fit(signals.begun(self._loader), signals.stops_after, signals.saves_after)
            wait_s, total_s = self._loader.steady_wait_s, time.monotonic() - start_s
            if reason is None and self.completed_steps < config.steps:  # the batches have ended before
                reason = signals.stops_after(self.completed_steps)
            assert self._saving is not None
            with self._phases("save"):
                self.save(force=True)  # before the prefetcher is closed: a read of it may hang
                self._saving.checkpoints.wait_until_finished()
                self._saving.forget_copies()
            stages_s = {**batches.stage_times_s, "transfer": self._loader.transfer_time.total_s}
        if (warning := input_bound_warning(wait_s, total_s, stages_s, DATA_REMEDIES)) is not None:
            _log.warning("%s", warning)
        return reason

    def _lacks_evaluation(self) -> bool:
        """Whether a request has stopped the evaluation after the last completed step, and none was made since."""
        if self._is_evaluated:
            return False
        rows = [row for row in self.metrics if row["step"] == self.completed_steps] if self._is_main else []
        return not self._peers.broadcast(any(name.startswith("eval/") for row in rows for name in row))

    def _check_stop(self) -> None:
        """Raises _EvaluationStopped if the run stops after this step, and all processes know it."""
        signals = self._signals
        if signals is not None and all(self._peers.gather(signals.stop_is_due(self.completed_steps))):
            raise _EvaluationStopped

    def _log_evaluation(self) -> bool:
        """Evaluates, and logs it; returns False if a request to stop came first: the next start evaluates."""
        with self._phases("evaluation"):
            try:
                metrics = self.evaluate()
                if self.run.train.eval_tasks:
                    self._check_stop()
                    metrics |= self._texts.scores(self._evaluated_params)
            except _EvaluationStopped:
                return False
            self._eval_metrics, self._eval_step = metrics, self.completed_steps
            if self._skipped is not None:
                skipped = self._skipped.collect_evaluation(self._data.validation, self.completed_steps)
                self._eval_metrics["eval/skipped"] = skipped
            self._trackers.log(self.completed_steps, self._eval_metrics)
        text = self._sample()
        self._interval.pause()
        self._numerics.check_evaluation(self.completed_steps, self._eval_metrics)
        if text is not None:
            self._trackers.log_sample(self.completed_steps, text)
        return True

    def _finish_profile(self) -> None:
        """Ends the profile, if there is one, and logs its text."""
        with self._phases("profile"):
            text = self._profiler.finish(self.completed_steps, self.state)
        if text is not None:
            self._interval.pause()
            self._trackers.log_profile(self.completed_steps, text)

    def _sample(self) -> str | None:
        """Returns `track.sample_prompt` with the model's continuation; None without a prompt."""
        if self.run.track.sample_prompt is None:
            return None
        with self._phases("sample"):
            return self._texts.sample(self._evaluated_params)

    def _make_record(self, statistics: RunStatistics) -> dict[str, Any]:
        return {
            **start_record(
                self._loaded, self.program, self.dataset, command=self._command, decisions=self._numerics.decisions
            ),
            "peak": self._peak,
            "derived": {name: list(value) for name, value in statistics.items()},
            "baselines": self.baselines,
            "changes": self._changes,
        }

    def _summary(self, reason: str | None, wall_s: float) -> dict[str, Any]:
        """Returns the contents of summary.json."""
        return {
            "status": "finished" if reason is None else "stopped",
            "steps": self.completed_steps,
            **summary_of_metrics(self.metrics, self.run.data.modality, wall_s),
            f"{self.run.data.modality}s": self.completed_steps * units_per_step(self.program),
            "validation": {name.removeprefix("eval/"): value for name, value in self._eval_metrics.items()},
            "baselines": self.baselines,
            "peak_flops_per_device": self._peak["flops"],
            "peak_source": self._peak["source"],
            "checkpoint": f"{self.run_dir.checkpoints}/{self.completed_steps}",
            "report": f"{self.run_dir.location}/{REPORT_FILE}",
        }
