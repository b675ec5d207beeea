"""A run that starts from the parameters of another one: `init=runs/OTHER`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.config import load
from jaxinfra.data.pairs import PairData
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.objectives.dpo import DPO
from jaxinfra.prepare.documents.formats import Preference
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.run import Run
from jaxinfra.train.trainer import Trainer
from tests.refusals import refused
from tests.stores import bytes_recipe, jsonl
from tests.tiny_run import Tiny, launch

QUICK = ("train.eval_every=none", "checkpoint.save_every=100", "track.console=off")


def quick(tiny: Tiny, *overrides: str, name: str) -> Run:
    return tiny.loaded(f"name={name}", *QUICK, *overrides)


@pytest.fixture
def base(tiny: Tiny) -> Trainer:
    trainer = Trainer(quick(tiny, name="base"))
    trainer.train()
    return trainer


def test_starts_from_the_parameters_of_the_other_run(tiny: Tiny, base: Trainer) -> None:
    """The first loss is what the other run would have had next, on other data order the same parameters."""
    tuned = Trainer(quick(tiny, f"init={tiny.directory('base')}", "data.seed=5", "train.steps=6", name="tuned"))
    summary = tuned.train()
    assert summary["status"] == "finished" and tuned.completed_steps == 6
    assert tuned.metrics[0]["loss"] < 0.7 * base.metrics[0]["loss"]
    record = json.loads((tiny.directory("tuned") / "run.json").read_text())
    other = json.loads((tiny.directory("base") / "run.json").read_text())
    assert record["init"] == {"run": str(tiny.directory("base")), "step": 12, "fingerprint": other["fingerprint"]}


def test_goes_on_only_with_the_same_init(tiny: Tiny, base: Trainer) -> None:
    init = f"init={tiny.directory('base')}"
    steps = ("train.steps=6", "optim.schedule.warmup_steps=0")
    begun = tiny.launch(init, "name=tuned", *steps, *QUICK[:2])
    assert begun.code == 0 and f" {init}@12\n" in begun.out
    again = tiny.launch(init, "name=tuned", *steps, *QUICK)
    assert again.code == 0 and "nothing to do" in again.out
    refused(tiny.launch("name=tuned", *steps, *QUICK), "tuned init= base@12 none name=ANOTHER")
    refused(tiny.launch(f"{init}@5", "name=tuned", *steps, *QUICK), "tuned base@12 base@5 name=ANOTHER")


def test_what_cannot_be_started_from_is_refused(tiny: Tiny, base: Trainer) -> None:
    init = f"init={tiny.directory('base')}"
    wider = tiny.launch(init, "model.layers.mlp.dim=128", "name=wider", *QUICK)
    refused(wider, "params.blocks.mlp.down.weight 64 128")
    refused(tiny.launch(f"init={tiny.runs}/nothing", "name=lost", *QUICK), "nothing run.json runs/quickstart")
    gone = tiny.launch(f"{init}@7", "name=gone", *QUICK)
    assert gone.code == 79 and "of step 7" in gone.err and "12" in gone.err


def test_preferences_are_learned_against_the_frozen_start(tiny: Tiny, base: Trainer, tmp_path: Path) -> None:
    """Numbers that rise are chosen over numbers that fall: after a few steps the margin is positive everywhere."""
    words = [{"prompt": f"{n} ", "chosen": "up up", "rejected": "down"} for n in range(60)]
    fields = {"format": Preference(template=None), "validation": ByKey(fraction=0.2)}
    source = jsonl(tmp_path / "source", words)
    recipe = bytes_recipe(source.root, tmp_path / "pairs", **fields)
    prepare(recipe, workers=1)
    run = quick(tiny, f"init={tiny.directory('base')}", "optim.schedule.warmup_steps=0", name="dpo")
    run = replace(run, objective=DPO(beta=0.5), data=PairData(store=recipe.store, seq_len=16))
    trainer = Trainer(run)
    trainer.train()
    assert trainer.metrics[0]["loss"] == pytest.approx(np.log(2), rel=1e-3)
    last = [row for row in trainer.metrics if "eval/reward_margin" in row][-1]
    assert last["eval/reward_margin"] > 0.1 and last["eval/reward_accuracy"] > 0.9
    assert trainer.state is not None and base.state is not None
    reference = [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.state.reference)]
    for kept, start in zip(reference, jax.tree.leaves(base.state.params), strict=True):
        assert np.array_equal(kept, np.asarray(start))
    file = tmp_path / "found.json"
    assert launch("evaluate", str(trainer.run_dir.path), "mesh.fsdp=2", "mesh.tensor=4", "--json", str(file)).code == 0
    found = json.loads(file.read_text())["validation"]
    assert found == pytest.approx({name: last[f"eval/{name}"] for name in found}, rel=1e-4)
    again = Trainer(replace(run, train=replace(run.train, steps=run.train.steps)))
    assert again.train()["status"] == "finished before"
    assert load(trainer.run_dir.record, root=Run).run.objective == DPO(beta=0.5)


def test_a_cached_reference_trains_as_one_in_the_step_does(tiny: Tiny, base: Trainer, tmp_path: Path) -> None:
    """Losses and rewards are equal; the cache is kept, mended if it is damaged, and no other base is taken for it."""
    words = [{"prompt": f"{n} ", "chosen": f"up {n}", "rejected": f"down {n}"} for n in range(61)]
    source = jsonl(tmp_path / "source", words)
    fields = {"format": Preference(template=None), "validation": ByKey(fraction=0.2)}
    recipe = bytes_recipe(source.root, tmp_path / "pairs", **fields)
    prepare(recipe, workers=1)

    def trained(name: str, *, cached: bool, **changes: Any) -> Trainer:
        run = quick(tiny, f"init={tiny.directory('base')}", "optim.schedule.warmup_steps=0", name=name)
        data = PairData(store=recipe.store, seq_len=16, cached_reference=cached)
        trainer = Trainer(replace(run, objective=DPO(beta=0.5), data=data, **changes))
        trainer.train()
        return trainer

    in_step, cached = trained("in_step", cached=False), trained("cached", cached=True)
    assert cached.state is not None and cached.state.reference is None
    for one, other in zip(in_step.metrics, cached.metrics, strict=True):
        names = [name for name in one if name.removeprefix("eval/").split("_")[0] in ("loss", "reward")]
        assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-5, abs=1e-6)
    kept = {file: file.read_bytes() for file in (tmp_path / "pairs").rglob("reference/*/*/*")}
    assert len(kept) == 2
    for file in kept:
        file.write_bytes(b"\0" * len(kept[file]))
    expected = cached.evaluate()
    assert Trainer(cached.run).evaluate() == pytest.approx(expected, rel=1e-6)
    assert [file.read_bytes() == content for file, content in kept.items()].count(True) == 1  # of validation alone
    record = json.loads(cached.run_dir.record.read_text())
    init = record["init"]
    without = {name: value for name, value in init.items() if name != "reference"}
    for changed, named in (
        ({**init, "reference": "of_another_base"}, "other ones than when the run has started"),
        (without, "use data.cached_reference=false"),
    ):
        cached.run_dir.record.write_text(json.dumps({**record, "init": changed}))
        with pytest.raises(ConfigError, match=named):
            Trainer(cached.run).evaluate()
    (folder,) = (tmp_path / "pairs").rglob("reference")
    shutil.rmtree(folder)
    folder.touch()  # nothing can be written below it, by whatever user
    with pytest.raises(StorageError, match=r"reference/.* cannot be written: .*data.cached_reference=false"):
        trained("unwritable", cached=True)
