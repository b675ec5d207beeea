"""Causal language modeling: each token predicts the next token of its document."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, override, runtime_checkable

import jax
import jax.numpy as jnp

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import NonNegativeFloat, PositiveInt
from jaxinfra.objectives import losses
from jaxinfra.objectives.objective import Apply, Batch, Objective


@runtime_checkable
class TextSamples(Protocol):
    """Validation samples of text, for the metric bits per byte."""

    @property
    def n_bytes(self) -> int:
        """Number of UTF-8 bytes covered by the targets that count."""
        ...


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """Next-token prediction.

    Attributes:
        loss_chunks: number of sequence chunks for the LM head and loss, to bound the memory of logits; None chooses
            (see `losses.CHUNK_TOKENS`).
        z_loss: weight of the squared log-normalizer of the logits (PaLM, section 5).
    """

    batch_fields: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    by_position: ClassVar[bool] = True
    partial_sums: ClassVar[bool] = True
    loss_chunks: Annotated[PositiveInt | None, NOT_FINGERPRINTED] = None
    z_loss: NonNegativeFloat = 0.0

    @override
    def loss(self, apply: Apply, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets_BT = batch["targets"]
        weights_BT = batch["weights"] if "weights" in batch else jnp.ones_like(targets_BT, jnp.float32)
        total, sums = losses.cross_entropy(
            apply(params, batch), targets_BT, weights_BT, num_chunks=self.loss_chunks, z_loss=self.z_loss
        )
        return losses.finalize(apply, total, sums)

    @override
    def evaluation_metrics(self, sums: Mapping[str, float], samples: Any) -> dict[str, float]:
        """Returns the loss in nats per token and, if the samples are text, bits per byte."""
        metrics = {"loss": sums["loss"] / sums["weight"]}
        if isinstance(samples, TextSamples):
            metrics["bits_per_byte"] = sums["loss"] / math.log(2) / samples.n_bytes
        return metrics

    @override
    def problems_with(self, data: Any) -> Iterable[Problem]:
        return self._check_chunks_divide(data.seq_len, "chunks must divide the sequence", "data.seq_len")

    @override
    def problems_of_shard(self, positions: int) -> Iterable[Problem]:
        return self._check_chunks_divide(
            positions, f"chunks must divide the {positions} positions of a sequence on one device"
        )

    def _check_chunks_divide(self, length: int, message: str, *fields: str) -> Iterable[Problem]:
        if self.loss_chunks is not None and length % self.loss_chunks:
            largest = next(n for n in range(min(self.loss_chunks, length), 0, -1) if length % n == 0)
            fix = f"use objective.loss_chunks={largest}"
            yield Problem(fields=("objective.loss_chunks", *fields), message=message, fix=fix)
