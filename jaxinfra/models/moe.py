"""A mixture of experts in place of an MLP: many MLPs, of which every token passes a few.

Shazeer et al. 2017, "Outrageously large neural networks", and what became of it: top-k routing with weights of a
softmax (Mixtral, Qwen3) or of sigmoids with groups, a shared expert and biases that balance the load (DeepSeek-V3).
What a token chooses is in `ops.routing`, how it gets there in `parallel.expert`, the product in `ops.grouped`.

Shape suffixes: B sequences, T positions, N = B * T tokens of a device, D residual width, F width of an expert,
E experts, K choices of a token, M rows of a device's own experts, L layers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count, Natural, NonNegative, Positive
from jaxinfra.models.layers import ACTIVATIONS, BLOCK, MLP, Stack
from jaxinfra.models.module import LayerStats
from jaxinfra.models.remat import product
from jaxinfra.ops import routing
from jaxinfra.ops.grouped import grouped_dot
from jaxinfra.ops.routing import Choices, Routing
from jaxinfra.parallel.expert import ExpertPlacement, plan_dispatch
from jaxinfra.parallel.sharding import as_varying, axis_names, has_stage_dim, local_weight
from jaxinfra.parallel.spec import constant, normal

LOAD, KEPT, BALANCE, Z = "expert_load", "expert_kept", "balance_loss", "router_z_loss"
"""What a layer counts: choices of each expert `[E]`, choices that experts took, and losses, summed over tokens."""

FLOAT32 = jnp.dtype("float32")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts.

    Attributes:
        count: experts.
        chosen: that each token passes.
        dim: hidden width of one; None is `mlp_dim` of the model.
        shared: experts that every token passes besides, as one MLP of so many times the width.
        score: what weights are made of: a "softmax" over all experts, or the "sigmoid" of each.
        normalise: the weights of a token's choices sum to one.
        scale: factor on the weights.
        groups: of consecutive experts; a token chooses in `chosen_groups` of them alone.
        chosen_groups: see `groups`.
        bias_rate: after every step a bias on the scores of each expert, which only choices see, goes up by so much if
            it got fewer choices than the mean of its layer, and down if more; 0 has no biases.
        capacity_factor: an expert takes so many times its even share of the choices of each sequence, the earlier
            positions first; choices beyond are dropped. None drops nothing. Decoding never drops.
        balance_loss: weight of the sequence-wise balance loss (see `ops.routing.balance`), summed over layers and, like
            the loss, over tokens, all of them: where few tokens are targets it is as much larger beside their loss.
        z_loss: weight of the squared log-normaliser of the router's logits, summed likewise.
    """

    count: Count = 8
    chosen: Count = 2
    dim: Count | None = None
    shared: Natural = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: Count = 1
    chosen_groups: Count = 1
    bias_rate: NonNegative = 0.0
    capacity_factor: Positive | None = None
    balance_loss: NonNegative = 0.0
    z_loss: NonNegative = 0.0

    def problems(self) -> Iterable[Problem]:
        """There are as many experts and groups as are chosen, and groups are of one size."""
        size = self.count // self.groups
        if self.chosen > self.count:
            fix = f"use chosen={self.count}"
            yield Problem(fields=("chosen", "count"), message="there are not so many experts", fix=fix)
        elif self.chosen_groups > self.groups:
            fix = f"use chosen_groups={self.groups}"
            yield Problem(fields=("chosen_groups", "groups"), message="there are not so many groups", fix=fix)
        elif self.groups > 1 and (self.count % self.groups or size < 2):
            fitting = max(n for n in range(1, self.groups + 1) if self.count % n == 0 and self.count // n > 1 or n == 1)
            message = "groups of equal size have two experts at least"
            yield Problem(fields=("groups", "count"), message=message, fix=f"use groups={fitting}")
        elif self.chosen > self.chosen_groups * size:
            message = f"{self.chosen_groups} groups have {self.chosen_groups * size} experts"
            fix = f"use chosen_groups={-(-self.chosen // size)}"
            yield Problem(fields=("chosen", "chosen_groups"), message=message, fix=fix)

    def capacity(self, length: int) -> int | None:
        """Choices of a sequence of this length that an expert takes at most; None for all."""
        if self.capacity_factor is None:
            return None
        return min(length, math.ceil(self.capacity_factor * length * self.chosen / self.count))

    def routing(self, length: int, *, drops: bool) -> Routing:
        """The rule of choice in sequences of this length."""
        return Routing(
            chosen=self.chosen,
            score=self.score,
            normalise=self.normalise,
            scale=self.scale,
            groups=self.groups,
            chosen_groups=self.chosen_groups,
            capacity=self.capacity(length) if drops else None,
        )


class MoE(nnx.Module):
    """A router and its experts, and the shared one."""

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: Experts,
        *,
        kind: Literal["swiglu", "geglu", "gelu"],
        out_scale: float,
        stack: Stack,
    ):
        """Declares the parameters; `hidden` is the width of an expert that does not say its own."""
        self.experts, self.kind, self.partitioner = experts, kind, stack.partitioner
        count, dim = experts.count, hidden if experts.dim is None else experts.dim
        self.router = stack.declare((width, count), ("embed", None), normal(width**-0.5), "matrix", contract=1)
        bias = partial(stack.declare, (count,), (None,), constant(0.0), "bias", trainable=False)
        self.bias = bias() if experts.bias_rate else None

        def matrices(rows: int, columns: int, axes: tuple[str, str], scale: float = 1.0) -> nnx.Param:
            shape, init = (count, rows, columns), normal(scale * rows**-0.5)
            return stack.declare(shape, ("experts", *axes), init, "matrix", contract=1, apart=1)

        self.gate = None if kind == "gelu" else matrices(width, dim, ("embed", "mlp"))
        self.up = matrices(width, dim, ("embed", "mlp"))
        self.down = matrices(dim, width, ("mlp", "embed"), out_scale)
        shared = partial(MLP, width, experts.shared * dim, kind=kind, bias=False, out_scale=out_scale, stack=stack)
        self.shared = shared() if experts.shared else None

    def __call__(self, x_BTD: jax.Array, *, drops: bool = True) -> tuple[jax.Array, LayerStats]:
        """Applies the experts to the stream: whole positions in, block positions and the counts of the layer out.

        With `drops` experts take no more than their capacity.
        """
        partitioner, weights = self.partitioner, self._ready()
        # The mesh axes over which devices have tokens of their own, or parts of experts.
        over = tuple(axis for name in ("batch", "sequence", "mlp") for axis in partitioner.mesh_axes(name))
        x_spec = jax.typeof(x_BTD).sharding.spec
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, weights)
        stage = ("stage",) if has_stage_dim(specs["up"]) else ()
        tokens = frozenset(over) - {*partitioner.mesh_axes("mlp"), *stage}
        rule = self.experts.routing(x_BTD.shape[1], drops=drops)

        def on_device(x: jax.Array, weights: Mapping[str, jax.Array]) -> tuple[jax.Array, LayerStats]:
            own = {name: local_weight(w, specs[name]) for name, w in weights.items()}
            y, stats = self._own(as_varying(x, x_spec, over), own, rule)
            y = jax.lax.pcast(y, partitioner.mesh_axes("mlp"), to="unreduced")
            stats = {name: jax.lax.pcast(a, tuple(tokens), to="unreduced") for name, a in stats.items()}
            return y, {name: a[None] for name, a in stats.items()} if stage else stats

        losses = {BALANCE: self.experts.balance_loss, Z: self.experts.z_loss}
        names = [LOAD, KEPT, *(name for name, weight in losses.items() if weight)]
        stat_specs = {name: P(*stage, unreduced=tokens) for name in names}
        out_specs = (P(*x_spec.partitions, unreduced=frozenset(partitioner.mesh_axes("mlp"))), stat_specs)
        y_BTD, stats = jax.shard_map(on_device, in_specs=(x_spec, specs), out_specs=out_specs)(x_BTD, weights)
        y_BTD = product(partitioner.shard(y_BTD, *BLOCK, None))
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), stats

    def _ready(self) -> dict[str, jax.Array]:
        """The weights, ready for use: those of the router whole and in float32."""
        partitioner, everywhere = self.partitioner, ("batch", "sequence", "mlp")
        ready = {
            "router": partitioner.gather_weight(self.router[...], ("embed", None), everywhere, FLOAT32),
            "up": partitioner.gather_weight(self.up[...], ("experts", "embed", "mlp")),
            "down": partitioner.gather_weight(self.down[...], ("experts", "mlp", "embed")),
        }
        if self.gate is not None:
            ready["gate"] = partitioner.gather_weight(self.gate[...], ("experts", "embed", "mlp"))
        if self.bias is not None:
            ready["bias"] = partitioner.gather_weight(
                jax.lax.stop_gradient(self.bias[...]), (None,), everywhere, FLOAT32
            )
        return ready

    # On each device

    def _own(self, x_BTD: jax.Array, weights: Mapping[str, jax.Array], rule: Routing) -> tuple[jax.Array, LayerStats]:
        """The device's tokens, and its part of the statistics: of the experts' width it has a part as well."""
        B, T, D = x_BTD.shape
        logits_BTE = jnp.einsum(
            "btd,de->bte", x_BTD.astype(FLOAT32), weights["router"], precision=jax.lax.Precision.HIGHEST
        )
        choices = routing.choose(logits_BTE, rule, weights.get("bias"))
        chosen_BTE, taken_BTK = routing.chosen_by(choices.experts, self.experts.count), choices.experts
        if rule.capacity is not None:
            kept = routing.within_capacity(
                choices.experts, chosen_BTE, rule.capacity, self.partitioner.sequence_sharding
            )
            taken_BTK = jnp.where(kept, choices.experts, self.experts.count)
        plan = plan_dispatch(self._placement(B, T, rule), taken_BTK.reshape(B * T, -1))
        y_MD = self._made(plan.dispatch(x_BTD.reshape(B * T, D)), weights, plan.group_sizes)
        home_NKD = product(plan.combine(y_MD)).astype(FLOAT32)
        y_ND = jnp.sum(home_NKD * choices.weights.reshape(B * T, -1, 1), axis=1)
        stats = self._layer_stats(logits_BTE, choices, chosen_BTE, taken_BTK)
        return y_ND.astype(x_BTD.dtype).reshape(B, T, D), stats

    def _placement(self, rows: int, length: int, rule: Routing) -> ExpertPlacement:
        """Where the experts are, for a device with so many positions of so many sequences."""
        axes, shards, count = (
            self.partitioner.mesh_axes("experts"),
            self.partitioner.num_shards("experts"),
            self.experts.count,
        )
        own = count // shards
        most = rows * length * min(rule.chosen, own)
        if rule.capacity is not None:
            most = min(most, rows * own * min(rule.capacity, length))
        return ExpertPlacement(
            num_experts=count, axes=axes, num_shards=shards, max_rows=most, ragged=self.partitioner.platform == "tpu"
        )

    def _made(self, x_MD: jax.Array, weights: Mapping[str, jax.Array], sizes_E: jax.Array) -> jax.Array:
        """What each expert makes of its rows; a partial sum where its width is spread."""

        def times(x: jax.Array, name: str) -> jax.Array:
            return grouped_dot(x, weights[name], sizes_E, platform=self.partitioner.platform)

        act, up_MF = ACTIVATIONS[self.kind], product(times(x_MD, "up"))
        hidden_MF = act(up_MF) if self.gate is None else act(product(times(x_MD, "gate"))) * up_MF
        return times(hidden_MF, "down")

    def _layer_stats(
        self, logits_BTE: jax.Array, choices: Choices, chosen_BTE: jax.Array, taken_BTK: jax.Array
    ) -> LayerStats:
        """Sums over the device's tokens; devices that share tokens, by the experts' width, count them once."""
        sharding, config = self.partitioner.sequence_sharding, self.experts
        stats = {
            LOAD: jnp.sum(chosen_BTE, axis=(0, 1), dtype=FLOAT32),
            KEPT: jnp.sum(taken_BTK < config.count, dtype=FLOAT32),
        }
        if config.balance_loss:
            stats[BALANCE] = config.balance_loss * routing.balance(chosen_BTE, choices.scores, config.chosen, sharding)
        if config.z_loss:
            stats[Z] = config.z_loss * routing.z_loss(logits_BTE)
        shared = self.partitioner.mesh_axes("mlp")
        if not shared:
            return stats
        first = jax.lax.axis_index(shared) == 0
        return jax.lax.psum({name: jnp.where(first, a, 0) for name, a in stats.items()}, shared)


# What becomes of the counts of all layers


def aux_loss(stats: LayerStats, axes: tuple[str, ...]) -> jax.Array | None:
    """What layers add to the loss, a scalar that is a partial sum over `axes`, those that tokens are spread over."""
    losses = [stats[name] for name in (BALANCE, Z) if name in stats]
    if not losses:
        return None
    spec = jax.typeof(losses[0]).sharding.spec
    stage = tuple(axis for part in spec.partitions for axis in axis_names(part))

    def own(*losses: jax.Array) -> jax.Array:
        total = sum((jnp.sum(one) for one in losses[1:]), start=jnp.sum(losses[0]))
        return jax.lax.pcast(total, stage, to="unreduced") if stage else total

    in_specs = (spec,) * len(losses)
    return jax.shard_map(own, in_specs=in_specs, out_specs=P(unreduced=frozenset(axes)))(*losses)


def metrics(stats: LayerStats, weight: jax.Array) -> dict[str, jax.Array]:
    """What is logged of a step: from the statistics of all layers, `[L, ...]`, and the weight of its tokens.

    Losses are sums over all tokens and layers by the weight of the targets, as they are in what is trained. Loads are
    those of experts as parts of the mean of their layer: the largest of all, and of each expert the mean over layers.
    """
    if LOAD not in stats:
        return {}
    load_LE = stats[LOAD] / jnp.maximum(jnp.mean(stats[LOAD], axis=1, keepdims=True), 1)
    found = {name: jnp.sum(stats[name]) / weight for name in (BALANCE, Z) if name in stats}
    found["expert_load_max"] = jnp.max(load_LE)
    found["expert_dropped"] = 1 - jnp.sum(stats[KEPT]) / jnp.maximum(jnp.sum(stats[LOAD]), 1)
    return found | {f"expert_load/{e}": load for e, load in enumerate(jnp.mean(load_LE, axis=0))}


def updated_bias(bias_LE: jax.Array, stats: LayerStats, rate: float) -> jax.Array:
    """The biases after a step: experts with less than the mean load of their layer are lifted (Wang et al. 2024)."""
    load_LE = stats[LOAD]
    return bias_LE + rate * jnp.sign(jnp.mean(load_LE, axis=1, keepdims=True) - load_LE)
