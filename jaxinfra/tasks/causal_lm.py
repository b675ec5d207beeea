"""Causal language modelling: every token predicts the next one of its document."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import Count, NonNegative
from jaxinfra.models.decoder import Transformer
from jaxinfra.models.transformer import Sequences
from jaxinfra.ops.cross_entropy import CrossEntropy, cross_entropy
from jaxinfra.tasks.task import Field

CHUNK_TOKENS = 1024
"""Tokens of one device whose logits exist at once: enough rows for the matrix units, 0.5 GiB at 128k words."""


class TokenBatches(Sequences, Protocol):
    """What the task needs to know of the data."""

    @property
    def mask_documents(self) -> bool:
        """Whether a row holds several documents that may not see one another."""
        ...


class Text(Protocol):
    """What the task needs to know of the validation samples."""

    @property
    def n_bytes(self) -> int:
        """Bytes of text that the targets of weight one stand for."""
        ...


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Next-token prediction.

    Attributes:
        loss_chunks: in how many parts a sequence passes the head; None keeps to `CHUNK_TOKENS` a device.
        z_loss: weight of the squared log-normaliser (see `CrossEntropy`).
    """

    modality: ClassVar[str] = "token"
    by_position: ClassVar[bool] = True
    loss_chunks: Annotated[Count | None, NOT_FINGERPRINTED] = None
    z_loss: NonNegative = 0.0

    def problems_with(self, data: TokenBatches) -> Iterable[Problem]:
        """Chunks divide the sequence."""
        return self._undivided(data.seq_len, "chunks must divide the sequence", "data.seq_len")

    def problems_of_shard(self, positions: int) -> Iterable[Problem]:
        """Chunks divide it."""
        return self._undivided(
            positions, f"chunks must divide the {positions} positions that a device has of a sequence"
        )

    def _undivided(self, length: int, message: str, *fields: str) -> Iterable[Problem]:
        if self.loss_chunks is not None and length % self.loss_chunks:
            fitting = next(n for n in range(min(self.loss_chunks, length), 0, -1) if length % n == 0)
            fix = f"use task.loss_chunks={fitting}"
            yield Problem(fields=("task.loss_chunks", *fields), message=message, fix=fix)

    def batch(self, data: TokenBatches, global_batch: int, *, validation: bool = False) -> dict[str, Field]:
        """Inputs and targets `[B, T]`; with document masks also segments, positions and weights."""
        shape, axes = (global_batch, data.seq_len), ("batch", "sequence")
        names = ("inputs", "targets", "segments", "positions") if data.mask_documents else ("inputs", "targets")
        fields = {name: Field(shape=shape, dtype=jnp.dtype("int32"), axes=axes) for name in names}
        if data.mask_documents or validation:
            fields["weights"] = Field(shape=shape, dtype=jnp.dtype("float32"), axes=axes)
        return fields

    def finish(
        self, model: Transformer, x_BTD: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Sums of cross-entropy and z-loss in nats, and of weights, over the tokens of the batch."""
        inputs_BT, hidden_BTD = batch["inputs"], model.final_norm(x_BTD)
        head_DV = model.head()
        weights_BT = batch["weights"] if "weights" in batch else jnp.ones_like(inputs_BT, jnp.float32)
        chunks, softcap = self._chunks(model, *inputs_BT.shape), model.config.logit_softcap
        config = CrossEntropy(chunks=chunks, z_loss=self.z_loss, softcap=softcap)
        total, (entropy, z_loss) = cross_entropy(hidden_BTD, head_DV, batch["targets"], weights_BT, config)
        over = jax.typeof(head_DV).sharding.spec.reduced
        ones_BT = jnp.ones_like(weights_BT)
        weight = jnp.einsum("bt,bt->", weights_BT, ones_BT, out_sharding=PartitionSpec(unreduced=over))
        return total, {"loss": entropy, "z_loss": z_loss, "weight": weight}

    def scores(self, sums: Mapping[str, float], validation: Text) -> dict[str, float]:
        """The loss in nats a token, and bits per byte of text."""
        bits = sums["loss"] / math.log(2)
        return {"loss": sums["loss"] / sums["weight"], "bits_per_byte": bits / validation.n_bytes}

    def derived(self, units: int, params: int) -> dict[str, tuple[float, str]]:
        """Tokens a parameter."""
        return {"tokens a parameter": (units / params, "20 is compute-optimal (Hoffmann et al. 2022)")}

    def _chunks(self, model: Transformer, batch: int, length: int) -> int:
        """The fewest chunks of equal length that keep a device at `CHUNK_TOKENS` tokens or below."""
        if self.loss_chunks is not None:
            return self.loss_chunks
        per_shard = length // model.partitioner.num_shards("sequence")
        local = batch * length // (model.partitioner.num_shards("batch") * model.partitioner.num_shards("sequence"))
        return next((n for n in range(1, per_shard) if per_shard % n == 0 and local // n <= CHUNK_TOKENS), per_shard)
