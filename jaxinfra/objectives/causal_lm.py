"""Causal language modeling: each token predicts the next token of its document.

Shape suffixes: B batch, T length.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Any, ClassVar, Protocol, override, runtime_checkable

import jax
import jax.numpy as jnp

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import NonNegativeFloat, PositiveInt
from jaxinfra.objectives import losses
from jaxinfra.objectives.objective import Apply, Batch, Objective
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.ops.mtp import MTP_TARGETS, MTP_WEIGHTS


@runtime_checkable
class TextSamples(Protocol):
    """Validation samples of text; `n_bytes` is the length in UTF-8 of the text that the weighted targets stand for."""

    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """The cross-entropy of every target token, given the tokens before it in its document.

    Attributes:
        loss_chunks: number of sequence chunks for the LM head and loss. The logits of one chunk exist at a time; None
            chooses the number (see `losses.CHUNK_TOKENS`).
        z_loss: weight of the squared log-normalizer of the logits (PaLM, section 5).
        mtp_weight: weight of the mean loss of the modules for multi-token prediction, if the model has some
            (DeepSeek-AI 2024, "DeepSeek-V3", equation 25); 0 leaves them as they are.
    """

    batch_fields: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    by_position: ClassVar[bool] = True  # the loss is a sum over positions
    partial_sums: ClassVar[bool] = True  # each device may return the sum over its own tokens
    loss_chunks: Annotated[PositiveInt | None, NOT_FINGERPRINTED] = None
    z_loss: NonNegativeFloat = 0.0
    mtp_weight: NonNegativeFloat = 0.3  # DeepSeek-V3 has it for two thirds of its tokens, then 0.1 (section 4.2)

    @property
    @override
    def trains_mtp(self) -> bool:
        return self.mtp_weight > 0

    @override
    def loss(self, apply: Apply, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, targets_BT = apply(params, batch), batch["targets"]
        weights_BT = batch.get("weights", jnp.ones_like(targets_BT, jnp.float32))
        total, sums = losses.cross_entropy(
            logits, targets_BT, weights_BT, num_chunks=self.loss_chunks, z_loss=self.z_loss
        )
        if isinstance(logits, FactoredLogits) and logits.mtp_hidden:
            sums["mtp_loss"] = self._mtp_loss(logits, batch)
            total += losses.scaled(sums["mtp_loss"], self.mtp_weight)
        return losses.reduce_partial_sums(apply, total, sums)

    def _mtp_loss(self, logits: FactoredLogits, batch: Batch) -> jax.Array:
        """Returns the mean over depths of the loss, summed over the batch."""
        depths = len(logits.mtp_hidden)
        of_each = (
            losses.cross_entropy(
                replace(logits, hidden=hidden_BTD),
                batch[MTP_TARGETS][:, depth],
                batch[MTP_WEIGHTS][:, depth] / depths,
                num_chunks=self.loss_chunks,
            )[0]
            for depth, hidden_BTD in enumerate(logits.mtp_hidden)
        )
        return reduce(jnp.add, of_each)

    @override
    def evaluation_metrics(self, sums: Mapping[str, float], samples: Any) -> dict[str, float]:
        """Returns the loss in nats per token and, if the samples are text, bits per byte."""
        metrics = {"loss": sums["loss"] / sums["weight"]}
        if isinstance(samples, TextSamples):
            total_bits = sums["loss"] / math.log(2)
            metrics["bits_per_byte"] = total_bits / samples.n_bytes
        return metrics

    @override
    def problems_with(self, data: Any) -> Iterable[Problem]:
        return self._problems_with_chunks(data.seq_len, "chunks must divide the sequence", "data.seq_len")

    @override
    def problems_of_shard(self, positions: int) -> Iterable[Problem]:
        message = f"chunks must divide the {positions} positions of a sequence on one device"
        return self._problems_with_chunks(positions, message)

    def _problems_with_chunks(self, length: int, message: str, *other_fields: str) -> Iterable[Problem]:
        chunks = self.loss_chunks
        if chunks is not None and length % chunks:
            divisors = [n for n in range(1, min(chunks, length) + 1) if length % n == 0]
            fix = f"use objective.loss_chunks={max(divisors)}"
            yield Problem(fields=("objective.loss_chunks", *other_fields), message=message, fix=fix)
