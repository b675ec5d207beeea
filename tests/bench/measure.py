"""Times the train steps of jaxinfra and the baseline, or of jaxinfra on two meshes, alternately in one process.

Other load on the machine slows both sides alike, so only their ratio is reliable. `time_sides`, `time_dispatch` and
`time_runs` take a config file with its overrides and the number of timed rounds; each is called in a new process.
"""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import jax

from jaxinfra.config import load, validate
from jaxinfra.errors import ConfigError
from jaxinfra.inference.language_model import require_text
from jaxinfra.machine.host_memory import keep_freed_memory
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.optim.optimizers import AdamW
from jaxinfra.parity.meshes import make_program, put_like, random_batch
from jaxinfra.processes.requests import RunSignals
from jaxinfra.program import TrainState
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.tracker import MultiTracker
from jaxinfra.train.cadence import Cadence
from jaxinfra.train.energy import Energy
from jaxinfra.train.loop import Loop
from jaxinfra.train.numerics import Numerics
from jaxinfra.train.profiler import Profiler
from jaxinfra.train.reporting import Reporting
from jaxinfra.train.trainer import Trainer
from jaxinfra.train.waiting import Waiting
from jaxinfra.train.watch import Watch
from tests.bench import DEFAULT_CONFIG
from tests.bench.baseline import BaselineConfig, make_train_step
from tests.bench.commands import Times
from tests.bench.table import time_rounds

WARMUP_STEPS = 3  # for compilation and first use of memory


def baseline_config(run: Run, naive_matmul: bool = False) -> BaselineConfig:
    """Returns the baseline with the same model, batch and optimizer; raises ConfigError if it cannot have them."""
    (model, data), adamw = require_text(run), run.optim.optimizer
    layer = model.layers[0]
    mixer, mlp = layer.mixer, layer.mlp
    if (
        len({*model.all_layers}) > 1
        or not isinstance(mixer, Attention)
        or not isinstance(mlp, MLP)
        or mixer.rope is None
        or mixer.kv_head_count != mixer.num_heads
        or not isinstance(adamw, AdamW)
    ):
        needs = "equal layers with rotary embeddings, as many key heads as query heads, an MLP, and AdamW"
        raise ConfigError(f"{run.name}: the baseline needs {needs}; use --config {DEFAULT_CONFIG}")
    return BaselineConfig(
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=mixer.num_heads,
        mlp_dim=mlp.dim,
        seq_len=data.seq_len,
        batch_size=run.train.global_batch,
        norm_eps=model.norm.eps,
        rope_theta=mixer.rope.theta,
        peak_lr=run.optim.peak_lr,
        weight_decay=adamw.weight_decay,
        compute_dtype=run.precision.compute,
        naive_matmul=naive_matmul,
    )


@dataclass
class TimedStep:
    """A train step with its state and its batch."""

    step: Callable[..., tuple[object, ...]]  # called as `step(*state, batch)`; returns the new state, then its output
    state: Sequence[object]
    batch: Mapping[str, jax.Array] | jax.Array
    context: Callable[[], AbstractContextManager[object]] = nullcontext  # makes the context in which it runs
    output: object = None  # of the last call

    def time(self, number: int = 0, *, dispatch_only: bool = False) -> float:
        """Makes one step and returns its seconds, or those of its dispatch. The number of the round changes nothing."""
        with self.context():
            start_s = time.perf_counter()
            *self.state, self.output = self.step(*self.state, self.batch)
            dispatched_s = time.perf_counter()
            jax.block_until_ready((self.state, self.output))
            return (dispatched_s if dispatch_only else time.perf_counter()) - start_s


class Timed(Protocol):
    """A step that can be timed, in this process or in another."""

    def time(self, number: int = 0, *, dispatch_only: bool = False) -> float:
        """Makes one step and returns its seconds, or those of its dispatch."""
        ...


type Makers = Mapping[str, Callable[[Run], Timed]]
"""How the step of each side is made."""


def jaxinfra_step(run: Run) -> TimedStep:
    """Returns the train step of a run on random tokens, without loss weights or document masks."""
    program, tokens = make_program(run), random_batch(run)
    specs = {name: program.batch[name] for name in ("inputs", "targets")}
    with program.on_mesh:
        state = program.init(jax.random.key(run.seed))
    batch = put_like({name: tokens[name] for name in specs}, specs)
    return TimedStep(program.train_step, [state], batch, lambda: program.on_mesh)


def baseline_step(run: Run, naive_matmul: bool = False) -> TimedStep:
    """Returns the baseline's train step for the same model, sharded over all devices."""
    step, *state, batch = make_train_step(baseline_config(run, naive_matmul), len(jax.devices()))
    return TimedStep(step, state, batch)


def time_alternately(steps: Mapping[str, Timed], num_rounds: int, *, dispatch_only: bool = False) -> Times:
    """Times the steps in turn, or only their dispatch; the devices are idle when a step starts."""
    sides = {name: partial(step.time, dispatch_only=dispatch_only) for name, step in steps.items()}
    return time_rounds(sides, num_rounds, warmup=WARMUP_STEPS)


def loop_host_s(run: Run, step: TimedStep, num_steps: int = 50) -> float:
    """Returns the seconds per iteration of the training loop, without waits for devices, logging and saving."""
    assert run.train.steps > 1 + num_steps, "after its last step the loop would also evaluate"
    track = TrackConfig(log_every=num_steps + 2, console="off")  # of the timed steps none is logged
    job = Trainer(replace(run, track=track)).job
    (state,), batch = step.state, step.batch
    assert isinstance(state, TrainState) and isinstance(batch, dict)
    jax.block_until_ready(step.state)
    watch = Watch(run.watchdog, job.run_dir, job.peers, Energy(track, job.peers))
    numerics = Numerics(job.program, watch.phases)
    reporting = Reporting(job, watch, numerics, MultiTracker(), peak_flops=1.0, skipped=lambda step: {})  # no samples
    profiler = Profiler(run.profile, Path())
    with job.program.on_mesh, RunSignals(job.peers) as requests:
        loop = Loop(
            job,
            state,
            0,
            reporting,
            profiler,
            Waiting(reporting),
            Cadence(run.checkpoint, 0, 1),
            requests,
            check_owner=lambda: None,
            after_step=lambda due, metrics: None,
            save=lambda: None,
        )
        batches = enumerate(itertools.repeat(batch))  # pairs of completed steps and a batch, without waits
        loop.run(lambda timeout_s: next(batches), 1)  # compiles
        reporting.report_pending()  # logs the first step
        start_s, waited_s = time.perf_counter(), watch.phases.seconds()["device"]
        loop.run(lambda timeout_s: next(batches), 1 + num_steps)
        elapsed_s = time.perf_counter() - start_s
    step.state = [loop.state]
    return (elapsed_s - (watch.phases.seconds()["device"] - waited_s)) / num_steps


def time_sides(makers: Makers, config: str, overrides: Sequence[str], num_rounds: int) -> Times:
    """Loads one run, makes the step of each side, and times them in turn."""
    if os.environ.get("JAX_NUM_CPU_DEVICES") == "1":
        keep_freed_memory()  # as a run on one CPU device does
    run = load_run(config, overrides)
    return time_alternately({side: make(run) for side, make in makers.items()}, num_rounds)


def time_dispatch(config: str, overrides: Sequence[str], num_rounds: int) -> Times:
    """Times the dispatch of a step on both sides; side "loop" is an iteration of jaxinfra's training loop."""
    run = load_run(config, overrides)
    jaxinfra = jaxinfra_step(run)
    steps = {"jaxinfra": jaxinfra, "baseline": baseline_step(run)}
    times_s = time_alternately(steps, 20 * num_rounds, dispatch_only=True)  # a dispatch takes less than a millisecond
    return times_s | {"loop": [loop_host_s(run, jaxinfra) for _ in range(num_rounds)]}


def time_runs(config: str, overrides: Mapping[str, Sequence[str]], num_rounds: int) -> Times:
    """Times jaxinfra's steps of one config with several lists of overrides."""
    steps = {side: jaxinfra_step(load_run(config, each)) for side, each in overrides.items()}
    return time_alternately(steps, num_rounds)


def load_run(config: str, overrides: Sequence[str]) -> Run:
    """Loads a config for all devices."""
    run = with_mesh_size(load(config, overrides, root=Run).run, len(jax.devices()))
    validate(run)
    return run
