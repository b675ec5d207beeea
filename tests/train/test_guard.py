"""Bad numbers: a step that is not finite changes nothing, a run goes back after several, or after a spike."""

import json
import logging
from dataclasses import dataclass, replace
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.config import load
from jaxinfra.errors import CorruptionError, NonFiniteError
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.run import GuardConfig, Run
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.train.guard import Decision, Guard, Rewind, with_decisions
from jaxinfra.train.trainer import Trainer
from tests.refusals import names, raises
from tests.tiny_run import STEPS, Tiny


@dataclass(frozen=True, kw_only=True)
class Faulty(CausalLM):
    """A loss that goes wrong on batches whose inputs have one of these sums."""

    sums: tuple[int, ...] = ()
    fault: str = "loss"

    @override
    def loss(self, apply: Any, params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, sums = super().loss(apply, params, batch)
        found = jnp.sum(batch["inputs"])
        is_bad = jnp.any(jnp.asarray(self.sums) == found)
        if self.fault == "gradient":  # of one leaf: the loss is finite
            zero = jnp.where(is_bad, 0.0, 1.0) * jax.tree.leaves(params)[0]
            return total + jnp.sum(0 * jnp.sqrt(jnp.abs(zero))), sums
        factor = jnp.where(is_bad, jnp.nan if self.fault == "loss" else 4.0, 1.0)
        return total * factor, {**sums, "loss": sums["loss"] * factor}


def sums_of(tiny: Tiny, *batches: int) -> tuple[int, ...]:
    """The sums of the inputs of batches, in the order of the data."""
    trainer = Trainer(tiny.loaded())
    data, size = trainer.dataset, trainer.run.train.global_batch
    read = [data.train.read(data.sample_ids(batch, size), weighted=False)["inputs"] for batch in batches]
    return tuple(int(inputs.sum()) for inputs in read)


def faulty(tiny: Tiny, name: str, objective: CausalLM, *overrides: str, **guard: Any) -> Trainer:
    run = tiny.loaded(f"name={name}", "track.console=off", *overrides)
    return Trainer(replace(run, objective=objective, guard=GuardConfig(skip_nonfinite=True, **guard)), command=["test"])


def assert_same(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


SHARDED = ("mesh.fsdp=4", "mesh.tensor=2", "optim.optimizer=muon", "optim.offload=true")


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [(("mesh.replica=2", "mesh.fsdp=4", "optim.ema_decay=0.9"), "loss"), (SHARDED, "loss"), (SHARDED, "gradient")],
    ids=["adamw, ema", "muon, offloaded", "one gradient"],
)
def test_a_step_that_is_not_finite_changes_nothing(tiny: Tiny, overrides: tuple[str, ...], kind: str) -> None:
    trainer = faulty(tiny, "step", Faulty(sums=sums_of(tiny, 1), fault=kind), *overrides)
    program, data = trainer.program, trainer.dataset
    with program.on_mesh:
        good, bad = (
            trainer.job.data.place(data.train.read(data.sample_ids(step, 8), weighted=False)) for step in (0, 1)
        )
        state, metrics = program.train_step(program.init(jax.random.key(0)), good)
        assert metrics["skipped"] == 0
        before = jax.tree.map(np.array, state)
        state, metrics = program.train_step(state, bad)
        assert metrics["skipped"] == 1 and int(state.step) == 2
        assert_same(replace(state, step=before.step), before)
        after, metrics = program.train_step(state, good)
        assert metrics["skipped"] == 0
        assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True))


def test_one_bad_batch_costs_its_step(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    trainer = faulty(tiny, "once", Faulty(sums=sums_of(tiny, 6)))
    assert trainer.train()["status"] == "finished"
    (warning,) = caplog.messages
    names(warning, "step 7: nan skipped")
    rows = {int(row["step"]): row for row in read_metrics(trainer.run_dir.metrics) if "loss" in row}
    assert rows[7]["skipped_steps"] == 1 and np.isfinite(rows[8]["loss"]) and "skipped_steps" not in rows[8]


@pytest.mark.parametrize("kind", ["loss", "spike"])
def test_a_run_goes_back_and_a_replay_leaves_out_the_same(
    tiny: Tiny, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    policy = {"max_nonfinite": 2} if kind == "loss" else {"spike": 8.0, "window": 8, "skip_batches": 1}
    bad = (6, 7) if kind == "loss" else (9,)
    objective = Faulty(sums=sums_of(tiny, *bad), fault=kind)
    copies = (f"checkpoint.local={tiny.runs.parent}/local", "checkpoint.local_every=2")  # it does not go back to one
    trainer = faulty(tiny, "back", objective, *copies, **policy)
    assert trainer.train()["steps"] == STEPS
    record = json.loads(trainer.run_dir.record.read_text())
    (decision,) = record["decisions"]
    skip = [5, 8] if kind == "loss" else [5, 11]
    assert (decision["to"], decision["skip"], decision["step"]) == (5, skip, bad[-1] + 1)
    (message,) = [each for each in caplog.messages if "going back" in each]
    names(message, f"step {bad[-1] + 1}: going back to step 5, {skip[0]} {skip[1]}")
    assert record["config"]["train"]["skip_batches"] == [skip] and record["skip_batches"] == []
    losses = tiny.losses("back")
    assert len(losses) == STEPS
    # The same command goes on with it: its config is not another one.
    assert faulty(tiny, "back", objective, **policy).train()["status"] == "finished before"
    # A replay leaves out the same batches, and meets nothing bad.
    replayed = load(trainer.run_dir.record, ("name=replayed",), imports=[__name__], root=Run)
    assert replayed.run.train.skip_batches == (tuple(skip),)
    caplog.clear()
    assert Trainer(replayed).train()["status"] == "finished"
    assert not [each for each in caplog.messages if "step " in each]
    assert tiny.losses("replayed") == losses


def test_a_run_that_goes_back_in_vain_ends(tiny: Tiny) -> None:
    """The update of the first step makes all later losses useless."""
    trainer = faulty(tiny, "vain", CausalLM(), "optim.peak_lr=1e30", "checkpoint.save_every=100", max_nonfinite=2)
    with raises(NonFiniteError, "step again gone back to step 0 name=ANOTHER"):
        trainer.train()
    status = json.loads((trainer.run_dir.path / "summary.json").read_text())
    assert status["status"] == "failed" and not list(trainer.run_dir.checkpoints.iterdir())


def test_the_guard_goes_on_where_the_last_start_has_stopped() -> None:
    config = GuardConfig(skip_nonfinite=True, spike=6.0, window=8)
    losses = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1, 2.05, 3.5]
    guard = Guard(config)
    for step, loss in enumerate(losses[:9], 1):
        guard.look(step, loss, skipped=False)
    for each in (guard, Guard(config, json.loads(json.dumps(guard.history)))):
        with pytest.raises(Rewind, match="10: the loss 3.5000 is 1"):
            each.look(10, losses[9], skipped=False)


def test_ranges_that_touch_are_joined(tiny: Tiny) -> None:
    decisions = [Decision(9, 5, (5, 8), ""), Decision(20, 10, (8, 12), ""), Decision(30, 20, (40, 41), "")]
    ranges = with_decisions([(0, 2), (41, 43)], decisions)
    assert ranges == ((0, 2), (5, 12), (40, 43))
    train = replace(tiny.loaded().train, skip_batches=ranges)
    assert [train.batch_of_step(step) for step in (0, 2, 3, 4, 31)] == [2, 4, 12, 13, 43]


def flip(array: jax.Array, device: int) -> jax.Array:
    """Flips a bit of the mantissa in the copy of one device."""
    shards = []
    for shard in array.addressable_shards:
        values = np.array(shard.data)
        if shard.device.id == device:
            values.view(np.uint32).reshape(-1)[3] ^= 1 << 9
        shards.append(jax.device_put(values, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


@pytest.mark.parametrize(("mesh", "warns"), [("mesh.replica=2", False), ("mesh.fsdp=8", True)])
def test_a_mesh_without_copies_to_compare_is_warned_of(
    tiny: Tiny, mesh: str, *, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = faulty(tiny, f"copies-{mesh}", CausalLM(), mesh, "train.steps=3", compare_replicas_every=1)
    trainer.train()
    found = [message for message in caplog.messages if "compare_replicas_every=1" in message]
    assert len(found) == warns
    if warns:
        names(found[0], "% of the state mesh.replica=2")


@pytest.mark.parametrize(("mesh", "named"), [("mesh.replica=4", "device 5"), ("mesh.replica=2", "device 1 or 5")])
def test_a_device_that_computes_wrong_is_named(tiny: Tiny, mesh: str, named: str) -> None:
    trainer = faulty(tiny, "flipped", CausalLM(), mesh, "mesh.fsdp=-1", compare_replicas_every=1)
    train_step, leaf = trainer.program.train_step, "params.blocks.mlp.up.weight"

    def step(state: Any, batch: Any) -> Any:
        state, metrics = train_step(state, batch)
        if int(state.step) == 8:
            params = jax.tree.map(lambda x: x, state.params)
            params["blocks"]["mlp"]["up"]["weight"] = flip(params["blocks"]["mlp"]["up"]["weight"], 5)
            state = replace(state, params=params)
        return state, metrics

    step.lower = train_step.lower  # what a step needs is asked before it is called
    trainer.program.train_step = step
    with raises(CorruptionError, f"step 8: {leaf}", named, "process 0"):
        trainer.train()
    assert [path.name for path in trainer.run_dir.checkpoints.iterdir()] == ["5"]
