"""Rows 24 to 27: numbers that go wrong."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxinfra.checkpoint.disk_steps import DiskSteps
from jaxinfra.errors import CorruptionError, NonFiniteError
from tests.faults.config import BATCH, RecordedTokens, checksum
from tests.faults.harness import CONFIG_MODULE, Harness, Run, named, require
from tests.faults.matrix import row


def _checksums(harness: Harness, steps: Sequence[int], *, seed: int = 0) -> tuple[int, ...]:
    """Returns the checksums of the batches of these steps, counted from 1, in the order of a seed."""
    _ = harness.config  # prepares the store
    data = RecordedTokens(store=str(harness.store), seq_len=32, seed=seed).open()
    read = [data.train.read(data.sample_ids(step - 1, BATCH), weighted=False)["inputs"] for step in steps]
    found = tuple(int(checksum(inputs)) for inputs in read)
    require(len({*found}) == len(found), "batches with the same checksum")
    return found


def _faulty(harness: Harness, name: str, **faults: Sequence[int]) -> Path:
    """Returns a config whose objective goes wrong on the batches with these checksums."""
    objective = f"base.FaultyLM({', '.join(f'{fault}={tuple(checksums)}' for fault, checksums in faults.items())})"
    return harness.write_config(name, f"replace(base.config(), objective={objective})")


def _state(run: Run, step: int) -> dict[str, np.ndarray]:
    """Returns a checkpoint without the counters of steps."""
    stored = DiskSteps(run.checkpoints)
    manifest = stored.manifest(step)
    return {name: stored.read_leaf(step, manifest, name) for name in manifest.leaves if name != "step"}


@row(
    24,
    fault="NaN or infinity in the loss of a batch; NaN in one leaf of the gradient",
    must="the step is skipped on all ranks; the state is bit-identical before and after",
)
def one_nan(harness: Harness) -> str:
    """Makes the last batch bad on a sharded mesh: the end saves it, though a step that is skipped is not saved.

    One program has all faults; each order of the data has another last batch.
    """
    words = ("guard.skip_nonfinite=true", "checkpoint.save_every=1", "train.steps=12")
    faults = ("nan", "infinity", "gradient")
    config = _faulty(
        harness, "nonfinite", **{fault: _checksums(harness, [12], seed=seed) for seed, fault in enumerate(faults)}
    )
    for seed, fault in enumerate(faults):
        name = f"nan-{fault}"
        ended = harness.train(name, *words, f"data.seed={seed}", processes=2, config=config)
        require(ended.code == 0, ended)
        run = harness.run(name)
        before, after = _state(run, 11), _state(run, 12)
        different = [leaf for leaf in before if before[leaf].tobytes() != after[leaf].tobytes()]
        require(not different, f"{fault}: {different}")
        require(run.steps() == [*range(1, 13)], run.steps())
    return "skipped three times, every leaf bit-identical before and after"


@row(
    25,
    fault="NaN in every step from some step on",
    must="after n in a row it goes back to an intact step; the second time it ends with 80",
)
def only_nan(harness: Harness) -> str:
    """Makes all batches bad from step 24 on."""
    guard = ("guard.skip_nonfinite=true", "guard.max_nonfinite=3")
    ended = harness.train("nan-always", *guard, config=_faulty(harness, "nan", nan=_checksums(harness, range(24, 61))))
    require(ended.code == NonFiniteError.exit_code, ended)
    run = harness.run("nan-always")
    named(ended.err, "going back to step 20")
    require(run.steps() == [10, 20], run.steps())
    return f"went back to step 20, then 80: {ended.err.splitlines()[-1].partition('error: ')[2][:90]}..."


@row(
    26,
    fault="a spike of the loss",
    must="goes back and leaves out m batches, recorded; a replay of run.json gives the same losses",
)
def spike(harness: Harness) -> str:
    """Multiplies the loss of one batch by four."""
    guard = ("guard.spike=8.0", "guard.window=16", "guard.skip_batches=2")
    ended = harness.train("spike", *guard, config=_faulty(harness, "spike", spike=_checksums(harness, [35])))
    require(ended.code == 0, ended)
    named(ended.err, "going back to step 30")
    run = harness.run("spike")
    record = json.loads((run.path / "run.json").read_text())
    ((start, stop),) = (decision["skip"] for decision in record["decisions"])
    replay = harness.train("spike-again", f"--import={CONFIG_MODULE}", config=run.path / "run.json")
    require(replay.code == 0 and "going back" not in replay.err, replay)
    again = harness.run("spike-again")
    require(again.losses() == run.losses(), "the replay has other losses")
    require(again.states()[60] == run.states()[60], "the replay ends as another state")
    return f"went back to step 30, left out batches {start} to {stop - 1}; the replay has the same bits"


@row(
    27,
    fault="one bit of the mantissa flipped in one replica's gradient",
    must="the comparison of replicas names rank and step; 83",
)
def flipped_bit(harness: Harness) -> str:
    """Flips it on one of four processes, each a replica."""
    words = ("mesh.replica=4", "mesh.fsdp=1", "guard.compare_replicas_every=5", "train.steps=20")
    optimizer = "replace(base.config().optim, optimizer=base.FlippedAdamW(step=12, process=2))"
    config = harness.write_config("flipped", f"replace(base.config(), optim={optimizer})")
    ended = harness.train("flipped", *words, processes=4, config=config)
    require(ended.code == CorruptionError.exit_code, ended)
    line = next(line for line in ended.err.splitlines() if "other bits" in line)
    named(line, "step 15", "process 2")
    require(harness.run("flipped").steps() == [10], harness.run("flipped").steps())
    return "83 at step 15, process 2 named, last checkpoint 10"
