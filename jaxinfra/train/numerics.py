"""Checks the numbers of a run: losses, gradients, parameters, and copies of the state on several devices."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax

from jaxinfra.errors import NonFiniteError
from jaxinfra.program import Metrics, Program, TrainState
from jaxinfra.run import TrainConfig
from jaxinfra.train.guard import Decision, Guard, Rewind, with_decisions
from jaxinfra.train.phases import Phases
from jaxinfra.train.replicas import ReplicaCheck

_FEW = 0.01  # of the state
_log = logging.getLogger(__name__)


class Numerics:
    """Checks the numbers of a run, and keeps the decisions to leave out batches.

    Attributes:
        guard: looks at the loss of each step.
        decisions: the decisions to go back to a checkpoint, so far.
    """

    def __init__(self, program: Program, phases: Phases) -> None:
        self._program, self._config, self._phases = program, program.run.guard, phases
        self.guard = Guard(self._config)
        self.decisions: list[Decision] = []

    @property
    def train_config(self) -> TrainConfig:
        """The config of the training, with the batches to leave out that have been decided on so far."""
        train = self._program.run.train
        return replace(train, skip_batches=with_decisions(train.skip_batches, self.decisions))

    def read_decisions(self, record: Mapping[str, Any]) -> None:
        """Takes over the decisions in the run record of an earlier start."""
        self.decisions = [
            Decision(each["step"], each["to"], (each["skip"][0], each["skip"][1]), each["cause"])
            for each in record.get("decisions", ())
        ]

    def resume(self, record: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint that was saved with this record; {} is the start of the run."""
        self.guard = Guard(self._config, record.get("guard"))

    def go_back(self, rewind: Rewind, to: int) -> Decision:
        """Decides to go back to the checkpoint of `to` completed steps, without the batches since then.

        Raises NonFiniteError if the run has gone back to it before.
        """
        if any(each.to == to for each in self.decisions):
            raise NonFiniteError(
                f"step {rewind.step}: {rewind.cause}, again after the run has gone back to step {to} and left out "
                "batches; use a lower optim.peak_lr with name=ANOTHER, or look at the data of these batches with data "
                "peek"
            )
        train = self.train_config
        # From the first batch after the checkpoint to that of the last bad step, and as many more as the config says.
        skip = train.batch_of_step(to), train.batch_of_step(rewind.step - 1) + 1 + self._config.skip_batches
        decision = Decision(rewind.step, to, skip, rewind.cause)
        self.decisions.append(decision)
        return decision

    def look(self, step: int, metrics: Metrics) -> tuple[float, bool]:
        """Looks at a completed step, counted from 1; returns its loss, and whether its update was skipped.

        Raises Rewind if the run must go back.
        """
        loss, skipped = jax.device_get((metrics["loss"], metrics.get("skipped", 0.0)))
        if self._config.skip_nonfinite or math.isfinite(loss):
            self.guard.look(step, float(loss), skipped=bool(skipped))
        return float(loss), bool(skipped)

    def require_finite(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Copies the metrics of a step to the host.

        Raises NonFiniteError if a metric is not finite. If bad steps are skipped, only the learning rate must be.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        for name in ("lr",) if self._config.skip_nonfinite else ("loss", "grad_norm", "lr"):
            if not math.isfinite(values.get(name, 0.0)):
                raise NonFiniteError(
                    f"step {step}: {name} is {values[name]}; nothing was saved since: use name=ANOTHER with a lower "
                    "optim.peak_lr, a longer warmup, or another data.seed"
                )
        return values

    def check_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises Rewind if the validation loss is not finite."""
        if not math.isfinite(loss := metrics.get("eval/loss", 0.0)):
            raise Rewind(step, f"the validation loss is {loss}")

    def check_before_save(self, step: int, state: TrainState) -> None:
        """Raises Rewind if a parameter is not finite, and CorruptionError if copies differ."""
        # The loss of a step is computed before its update, which may be the one that is not finite.
        with self._phases.first("all_finite"):
            is_finite = jax.device_get(self._program.all_finite(state))
        if not is_finite:
            cause = "its update made a parameter NaN or infinite: check optim.peak_lr and optim.optimizer"
            raise Rewind(step, cause)
        if self._config.compare_replicas_every is not None:
            self.replicas.check(step, state)

    def warn_of_few_copies(self) -> None:
        """Warns if copies are to be compared on a mesh that has next to none."""
        every = self._config.compare_replicas_every
        if every is not None and (fraction := self.replicas.fraction) < _FEW:
            _log.warning(
                "guard.compare_replicas_every=%d: compares %.2g%% of the state, as no other part is on more than one "
                "device; use mesh.replica=2 or more",
                every,
                100 * fraction,
            )

    @cached_property
    def replicas(self) -> ReplicaCheck:
        """Compares the copies of the state on several devices."""
        assert isinstance(self._program.mesh, jax.sharding.Mesh)
        return ReplicaCheck(self._program.mesh, self._program.state)
