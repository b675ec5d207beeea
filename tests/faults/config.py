"""The run of the fault matrix, and its data, objective and optimizer, which record, or go wrong when they are told."""

import json
import os
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.data.interfaces import Batch
from jaxinfra.data.tokens import TokenData, TokenDataset
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.optimizers import AdamW
from jaxinfra.optim.schedules import Cosine
from jaxinfra.parallel.spec import PyTree
from jaxinfra.processes.peers import current_peers
from jaxinfra.run import Precision, Run, TrainConfig
from jaxinfra.track.base import RunStatistics, Tracker, TrackerConfig
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.remote import RemoteRun, RemoteTracker, Row

STEPS, SAVE_EVERY, EVAL_EVERY, BATCH = 60, 10, 20, 8
READS = "JAXINFRA_FAULTS_READS"
"""The variable that names the folder of what processes have read."""
LAST_STEP = "JAXINFRA_FAULTS_LAST_STEP"
"""The variable that names a file with a step, beyond which nothing is read: its batch is late."""

_thread = threading.local()


def config() -> Run:
    """Returns the run: two layers, 64 wide, 60 steps, a checkpoint every 10 of them, an evaluation every 20."""
    return Run(
        name="run",
        model=TransformerConfig(
            vocab_size=264,
            num_layers=2,
            hidden_size=64,
            layers=(Layer(mixer=Attention(num_heads=4), mlp=MLP(dim=128)),),
        ),
        data=RecordedTokens(store="store", seq_len=32),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps=5), peak_lr=3e-3),
        train=TrainConfig(steps=STEPS, global_batch=BATCH, eval_every=EVAL_EVERY, eval_samples=8),
        checkpoint=CheckpointConfig(save_every=SAVE_EVERY, keep_last=99),
        track=TrackConfig(log_every=1, console="plain", tensorboard=False),
    )


@dataclass(frozen=True, kw_only=True)
class RecordedTokens(TokenData):
    """Appends a line `STEP ID ID ...` for each batch to a file START-PID; steps are counted from 1.

    START is the same in all processes of a start, and another one in each start by a launcher.
    """

    @override
    def open(self, *, section: str = "data", hint: str = "") -> TokenDataset:
        dataset = super().open(section=section, hint=hint)
        if READS not in os.environ:
            return dataset
        sample_ids, read = dataset.sample_ids, dataset.train.read

        def ids_of_step(step: int, global_batch: int) -> np.ndarray:
            _thread.step = step + 1
            return sample_ids(step, global_batch)

        def recorded_read(ids: np.ndarray, *, weighted: bool) -> Batch:
            start = os.environ.get("JAX_COORDINATOR_ADDRESS", "joined") + os.environ.get("JAXINFRA_ROUND", "")
            several = start if current_peers().count > 1 else os.getpid()
            if (gate := os.environ.get(LAST_STEP)) is not None:
                while int(Path(gate).read_text()) < _thread.step:
                    time.sleep(0.02)
            with open(f"{os.environ[READS]}/{several}-{os.getpid()}", "a") as file:
                file.write(f"{' '.join(map(str, (_thread.step, *ids)))}\n")
            return read(ids, weighted=weighted)

        vars(dataset).update(sample_ids=ids_of_step)
        vars(dataset.train).update(read=recorded_read)
        return dataset


def checksum(inputs: Any) -> Any:
    """Returns the sum of tokens `[batch, sequence]`, each times its position in the batch, counted from 1."""
    rows, length = inputs.shape
    return (inputs * (np.arange(rows * length, dtype=np.int32) + 1).reshape(rows, length)).sum()


@dataclass(frozen=True, kw_only=True)
class FaultyLM(CausalLM):
    """A loss that goes wrong on batches with these checksums, see `checksum`.

    Attributes:
        nan: the loss is NaN.
        infinity: the loss is infinite.
        spike: the loss is four times as large.
        gradient: the gradient of one leaf is NaN; the loss stays as it is.
    """

    nan: tuple[int, ...] = ()
    infinity: tuple[int, ...] = ()
    spike: tuple[int, ...] = ()
    gradient: tuple[int, ...] = ()

    @override
    def loss(self, apply: Any, params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, sums = super().loss(apply, params, batch)
        found, factor = checksum(batch["inputs"]), jnp.float32(1)
        for checksums, bad in ((self.nan, jnp.nan), (self.infinity, jnp.inf), (self.spike, 4.0)):
            factor = jnp.where(jnp.isin(found, jnp.asarray(checksums, jnp.int32)), bad, factor)
        if self.gradient:  # the root has no slope at 0
            is_bad = jnp.isin(found, jnp.asarray(self.gradient, jnp.int32))
            zero = jnp.where(is_bad, 0.0, 1.0) * jax.tree.leaves(params)[0]
            total += jnp.sum(0 * jnp.sqrt(jnp.abs(zero)))
        return total * factor, {**sums, "loss": sums["loss"] * factor}


@dataclass(frozen=True, kw_only=True)
class Http(TrackerConfig):
    """Sends metrics to a server at a port of this machine."""

    port: int = 0

    @override
    def make_tracker(self, run_dir: Path) -> Tracker:
        return RemoteTracker(_HttpRun(f"http://127.0.0.1:{self.port}"), str(self.port), "url", announce=False)


class _HttpRun(RemoteRun):
    def __init__(self, url: str) -> None:
        self._url = url

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics) -> str:
        self._post({})
        return self._url

    @override
    def send(self, rows: Sequence[Row]) -> None:
        self._post([row._asdict() for row in rows])

    @override
    def finish(self, status: str, summary: Mapping[str, Any], end_ms: int | None = None) -> None:
        self._post({"status": status})

    def _post(self, values: object) -> None:
        with urllib.request.urlopen(self._url, json.dumps(values).encode()):
            pass


@dataclass(frozen=True, kw_only=True)
class FlippedAdamW(AdamW):
    """An optimizer that flips a bit of the mantissa of one gradient in a step, on the devices of one process alone.

    Attributes:
        step: after this number of completed steps.
        process: index of the process.
    """

    step: int = 0
    process: int = 0

    @override
    def transform(self, specs: PyTree) -> optax.GradientTransformation:
        adam = super().transform(specs)

        def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
            if jax.process_index() == self.process:  # the others compile another program
                leaves, tree = jax.tree.flatten(updates)
                first = leaves[0].astype(jnp.float32)
                mask = jnp.zeros(first.shape, jnp.uint32).at[(0,) * first.ndim].set(1 << 9)
                bits = jax.lax.bitcast_convert_type(first, jnp.uint32) ^ mask
                flipped = jax.lax.bitcast_convert_type(bits, jnp.float32)
                leaves[0] = jnp.where(state.count == self.step, flipped, first)
                updates = jax.tree.unflatten(tree, leaves)
            return adam.update(updates, state, params)

        return optax.GradientTransformation(adam.init, update)
