"""A mixture of experts in place of an MLP: many MLPs (experts); each token is routed to a few of them.

Shazeer et al. 2017, "Outrageously large neural networks", and its successors: top-k routing with softmax weights
(Mixtral, Qwen3), or with sigmoid scores, groups, a shared expert and load-balancing biases (DeepSeek-V3).

`ops.routing` chooses experts, `parallel.expert` sends tokens to them, `ops.grouped` multiplies with their weights.

Shape suffixes: B sequences, T positions, N = B * T tokens of a device, D residual width, F width of an expert,
E experts, K choices of a token, M rows of a device's own experts, L layers, S pipeline stages.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, override

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from jaxinfra.models.layers import (
    MLP,
    RESIDUAL,
    SEQUENCE,
    Activation,
    FeedForward,
    ParamFactory,
    activate,
    gather_stored,
    num_matrices,
)
from jaxinfra.models.module import LayerStats
from jaxinfra.models.remat import name_tensor, save_dot
from jaxinfra.ops import routing
from jaxinfra.ops.grouped import grouped_dot
from jaxinfra.ops.routing import ExpertChoice, RoutingRule
from jaxinfra.parallel.expert import ExpertPlacement, plan_dispatch
from jaxinfra.parallel.sharding import as_varying, axis_names, has_stage_dim, local_weight
from jaxinfra.parallel.spec import constant, normal

LOAD, SERVED, BALANCE_LOSS, Z_LOSS = "expert_load", "expert_served", "balance_loss", "router_z_loss"
"""Statistics of a layer, sums over tokens: choices per expert `[E]`, choices within capacity, and two losses."""

FLOAT32 = jnp.dtype("float32")


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts(FeedForward):
    """The sizes and the routing of a mixture of experts.

    Attributes:
        dim: hidden width of an expert.
        activation: activation and gating of an expert, as of an MLP.
        num_experts: number of experts, without shared ones.
        top_k: number of experts per token.
        num_shared_experts: experts that process every token, computed as one MLP of this many times the width.
        shared_gate: multiplies the output of shared experts by the sigmoid of a projection of the token (Qwen2-MoE).
        router_bias: a bias on the router's logits.
        bias: biases in the experts.
        score_function: scores are a "softmax" over all experts, or the "sigmoid" of each logit.
        normalize_weights: scales the weights of a token's experts to sum to one.
        routed_scaling_factor: factor on the weights.
        scale_inputs: multiplies the input of an expert by its weight, instead of its output (Llama 4).
        num_groups: number of groups of consecutive experts. A token chooses experts only from its `top_k_groups` best
            groups, by the sum of a group's two best scores (DeepSeek-V3, section 2.1.2).
        top_k_groups: see `num_groups`.
        bias_update_rate: step size of a bias on each expert's score, which affects choices but not weights. After each
            step the bias rises if the expert was chosen less often than the mean of its layer, else it falls. 0 has no
            biases.
        capacity_factor: the limit on an expert's choices per sequence, as a multiple of an even load; later positions
            are dropped first. None drops nothing. Decoding never drops.
        balance_loss: weight of `ops.routing.load_balance_loss`, summed over layers and all tokens, targets or not.
        z_loss: weight of the squared log-sum-exp of the router logits, summed in the same way.
    """

    dim: PositiveInt
    activation: Activation = "swiglu"
    num_experts: PositiveInt = 8
    top_k: PositiveInt = 2
    num_shared_experts: NonNegativeInt = 0
    shared_gate: bool = False
    router_bias: bool = False
    bias: bool = False
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = True
    routed_scaling_factor: float = 1.0
    scale_inputs: bool = False
    num_groups: PositiveInt = 1
    top_k_groups: PositiveInt = 1
    bias_update_rate: NonNegativeFloat = 0.0
    capacity_factor: PositiveFloat | None = None
    balance_loss: NonNegativeFloat = 0.0
    z_loss: NonNegativeFloat = 0.0

    def problems(self) -> Iterable[Problem]:
        """Yields a gate without shared experts, a `top_k` or `top_k_groups` that is too large, and unequal groups."""
        if self.shared_gate and not self.num_shared_experts:
            fix = "use num_shared_experts=1"
            yield Problem(fields=("shared_gate", "num_shared_experts"), message="there is no shared expert", fix=fix)
        experts, groups, group_size = self.num_experts, self.num_groups, self.num_experts // self.num_groups
        if self.top_k > experts:
            message, fix = f"there are {experts} experts", f"use top_k={experts}"
            yield Problem(fields=("top_k", "num_experts"), message=message, fix=fix)
        elif self.top_k_groups > groups:
            message, fix = f"there are {groups} groups", f"use top_k_groups={groups}"
            yield Problem(fields=("top_k_groups", "num_groups"), message=message, fix=fix)
        elif groups > 1 and (experts % groups or group_size < 2):
            fitting = max(n for n in range(1, groups + 1) if n == 1 or (experts % n == 0 and experts // n >= 2))
            message = "groups must have the same size, at least two experts"
            yield Problem(fields=("num_groups", "num_experts"), message=message, fix=f"use num_groups={fitting}")
        elif self.top_k > self.top_k_groups * group_size:
            message = f"{self.top_k_groups} groups have {self.top_k_groups * group_size} experts"
            fix = f"use top_k_groups={math.ceil(self.top_k / group_size)}"
            yield Problem(fields=("top_k", "top_k_groups"), message=message, fix=fix)

    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        return {"num_experts": (self.num_experts, "experts"), "dim": (self.dim, "mlp")}

    @override
    def matmul_params(self, hidden_size: int) -> int:
        # Those of the router, of the experts that process the token, and of the gate of shared experts.
        experts = num_matrices(self.activation) * self.dim * (self.top_k + self.num_shared_experts)
        gate = 1 if self.shared_gate else 0
        return hidden_size * (self.num_experts + experts + gate)

    @override
    def build(self, hidden_size: int, out_scale: float, params: ParamFactory) -> "MoE":
        return MoE(self, hidden_size, out_scale, params)

    def capacity(self, length: int) -> int | None:
        """Returns the capacity: the most choices of a sequence that an expert serves; None is unlimited."""
        if self.capacity_factor is None:
            return None
        return min(length, math.ceil(self.capacity_factor * length * self.top_k / self.num_experts))

    def routing_rule(self, length: int, *, drop_tokens: bool) -> RoutingRule:
        """Returns the rule for sequences of this length."""
        return RoutingRule(
            top_k=self.top_k,
            score_function=self.score_function,
            normalize_weights=self.normalize_weights,
            routed_scaling_factor=self.routed_scaling_factor,
            num_groups=self.num_groups,
            top_k_groups=self.top_k_groups,
            capacity=self.capacity(length) if drop_tokens else None,
        )


class MoE(nnx.Module):
    """A router, the experts that it chooses from, and an MLP of shared experts that processes every token."""

    def __init__(self, config: MixtureOfExperts, hidden_size: int, out_scale: float, params: ParamFactory):
        self.config, self.partitioner = config, params.partitioner
        experts, expert_dim = config.num_experts, config.dim
        router_init = normal(hidden_size**-0.5)
        self.router = params.param((hidden_size, experts), ("embed", None), router_init, "matrix", in_dims=1)
        self.router_bias = params.param((experts,), (None,), constant(0.0), "bias") if config.router_bias else None
        has_bias = config.bias_update_rate > 0
        self.bias = params.param((experts,), (None,), constant(0.0), "bias", state="buffer") if has_bias else None

        def matrices(inputs: int, outputs: int, axes: tuple[str, str], scale: float = 1.0) -> nnx.Param:
            shape, init = (experts, inputs, outputs), normal(scale * inputs**-0.5)
            return params.param(shape, ("experts", *axes), init, "matrix", batch_dims=1, in_dims=1)

        self.gate = None if config.activation == "gelu" else matrices(hidden_size, expert_dim, ("embed", "mlp"))
        self.up = matrices(hidden_size, expert_dim, ("embed", "mlp"))
        self.down = matrices(expert_dim, hidden_size, ("mlp", "embed"), out_scale)
        bias = partial(params.param, init=constant(0.0), role="bias", batch_dims=1)
        inner = partial(bias, (experts, expert_dim), ("experts", "mlp"))
        self.up_bias = inner() if config.bias else None
        self.gate_bias = inner() if config.bias and self.gate is not None else None
        self.down_bias = bias((experts, hidden_size), ("experts", None)) if config.bias else None
        gate = partial(params.param, (hidden_size, 1), ("embed", None), router_init, "matrix", in_dims=1)
        self.shared_gate = gate() if config.shared_gate else None
        shared = MLP(dim=config.num_shared_experts * expert_dim, activation=config.activation)
        self.shared = shared.build(hidden_size, out_scale, params) if config.num_shared_experts else None
        # By the name of a weight; `models.adapt` adds to both.
        self.scales, self.adapters = nnx.Dict[Any](), nnx.Dict[Any]()

    def __call__(self, x_BTD: jax.Array, *, drop_tokens: bool = True) -> tuple[jax.Array, LayerStats]:
        """Takes gathered positions; returns the output, with positions sharded like the residual stream, and stats."""
        partitioner, weights = self.partitioner, self._gather_weights()
        x_spec = jax.typeof(x_BTD).sharding.spec
        specs = {name: jax.typeof(w).sharding.spec for name, w in weights.items()}
        stage = ("stage",) if has_stage_dim(specs["up"]) else ()
        mlp_axes = partitioner.mesh_axes("mlp")
        # Along these mesh axes devices have different tokens, or different parts of the experts.
        varying_axes = (*partitioner.mesh_axes("batch"), *partitioner.mesh_axes("sequence"), *mlp_axes)
        # Statistics are partial sums over the axes that shard tokens. Those of different stages are not summed.
        token_axes = frozenset(varying_axes) - {*mlp_axes, *stage}
        rule = self.config.routing_rule(x_BTD.shape[1], drop_tokens=drop_tokens)

        def on_device(x: jax.Array, weights: Mapping[str, jax.Array]) -> tuple[jax.Array, LayerStats]:
            local = {name: local_weight(w, specs[name]) for name, w in weights.items()}
            y, stats = self._apply_local(as_varying(x, x_spec, varying_axes), local, rule)
            y = jax.lax.pcast(y, mlp_axes, to="unreduced")
            stats = {name: jax.lax.pcast(a, tuple(token_axes), to="unreduced") for name, a in stats.items()}
            return y, {name: a[None] for name, a in stats.items()} if stage else stats

        out_specs = (P(*x_spec.partitions, unreduced=frozenset(mlp_axes)), P(*stage, unreduced=token_axes))
        y_BTD, stats = jax.shard_map(on_device, in_specs=(x_spec, specs), out_specs=out_specs)(x_BTD, weights)
        y_BTD = save_dot(partitioner.shard(y_BTD, *RESIDUAL, None))
        if self.shared is None:
            return y_BTD, stats
        shared_BTD = self.shared(x_BTD)
        if self.shared_gate is not None:
            shared_BTD *= self._apply_shared_gate(self.shared_gate, x_BTD)
        return y_BTD + shared_BTD, stats

    def _apply_shared_gate(self, gate: nnx.Param, x_BTD: jax.Array) -> jax.Array:
        """Takes gathered positions; returns factors `[B, T, 1]`, with positions sharded like the residual stream."""
        axes = self.partitioner.mesh_axes("block_sequence")
        weight = self.partitioner.gather_weight(gate[...], ("embed", None), RESIDUAL)
        specs = tuple(jax.typeof(a).sharding.spec for a in (x_BTD, weight))

        def on_device(x: jax.Array, weight: jax.Array) -> jax.Array:
            # Each device has all positions, and computes the gate of its own ones.
            x = jax.lax.pcast(x, tuple(specs[0].reduced), to="varying")
            if axes:
                length = x.shape[1] // self.partitioner.num_shards("block_sequence")
                x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * length, length, axis=1)
            return jax.nn.sigmoid(x @ local_weight(weight, specs[1]))

        out_specs = self.partitioner.spec(*RESIDUAL, None)
        return jax.shard_map(on_device, in_specs=specs, out_specs=out_specs)(x_BTD, weight)

    def _gather_weights(self) -> dict[str, jax.Array]:
        """Gathers the weights for `_apply_local`; the names are those of the parameters."""
        gather, everywhere = self.partitioner.gather_weight, ("batch", "sequence", "mlp")
        weights = {
            "router": gather(self.router[...], ("embed", None), everywhere, FLOAT32),
        }
        for name, param in (("up", self.up), ("down", self.down), ("gate", self.gate)):
            if param is None:
                continue
            axes = ("experts", "mlp", "embed") if name == "down" else ("experts", "embed", "mlp")
            weights[name] = gather_stored(self.partitioner, param, self.scales.get(name), axes, in_dim=1)
            if name in self.adapters:
                weights[f"{name}_a"], weights[f"{name}_b"] = self.adapters[name].gather(SEQUENCE)
        if self.router_bias is not None:
            weights["router_bias"] = gather(self.router_bias[...], (None,), everywhere, FLOAT32)
        for name, bias in (("up_bias", self.up_bias), ("gate_bias", self.gate_bias)):
            if bias is not None:
                weights[name] = gather(bias[...], ("experts", "mlp"))
        if self.down_bias is not None:
            weights["down_bias"] = gather(self.down_bias[...], ("experts", None), everywhere)
        if self.bias is not None:
            weights["bias"] = gather(jax.lax.stop_gradient(self.bias[...]), (None,), everywhere, FLOAT32)
        return weights

    # In a `shard_map`

    def _apply_local(
        self, x_BTD: jax.Array, weights: Mapping[str, jax.Array], rule: RoutingRule
    ) -> tuple[jax.Array, LayerStats]:
        """Returns the output and stats of the device's tokens; the output is a partial sum if `mlp` is sharded."""
        B, T, D = x_BTD.shape
        logits_BTE = jnp.einsum(
            "btd,de->bte", x_BTD.astype(FLOAT32), weights["router"], precision=jax.lax.Precision.HIGHEST
        )
        if "router_bias" in weights:
            logits_BTE += weights["router_bias"]
        choice = routing.choose_experts(logits_BTE, rule, weights.get("bias"))
        mask_BTE = routing.expert_mask(choice.experts, self.config.num_experts)
        served_BTK = choice.experts  # the index `num_experts` stands for a choice beyond the capacity
        if rule.capacity is not None:
            sharding = self.partitioner.sequence_sharding
            is_served_BTK = routing.within_capacity(choice.experts, mask_BTE, rule.capacity, sharding)
            served_BTK = jnp.where(is_served_BTK, choice.experts, self.config.num_experts)
        plan = plan_dispatch(self._placement(B, T, rule), served_BTK.reshape(B * T, -1))
        x_ND, weights_NK1 = x_BTD.reshape(B * T, D), choice.weights.reshape(B * T, -1, 1)
        if self.config.scale_inputs:
            x_MD = plan.dispatch_choices((x_ND[:, None] * weights_NK1).astype(x_ND.dtype))
            weights_NK1 = 1  # the outputs are summed as they are
        else:
            x_MD = plan.dispatch(x_ND)
        y_NKD = save_dot(plan.combine(self._apply_experts(x_MD, weights, plan.group_sizes)))
        y_ND = jnp.sum(name_tensor(y_NKD, "mlp_down").astype(FLOAT32) * weights_NK1, axis=1)
        stats = self._layer_stats(logits_BTE, choice, mask_BTE, served_BTK)
        return y_ND.astype(x_BTD.dtype).reshape(B, T, D), stats

    def _placement(self, batch: int, length: int, rule: RoutingRule) -> ExpertPlacement:
        """Returns where the experts are, and how many rows a device may get from `batch` sequences of this length."""
        num_experts, num_shards = self.config.num_experts, self.partitioner.num_shards("experts")
        own_experts = num_experts // num_shards
        # A row is one choice of a token, and a token chooses each expert of a shard at most once.
        max_rows = batch * length * min(rule.top_k, own_experts)
        if rule.capacity is not None:
            max_rows = min(max_rows, batch * own_experts * min(rule.capacity, length))
        return ExpertPlacement(
            num_experts=num_experts,
            axes=self.partitioner.mesh_axes("experts"),
            num_shards=num_shards,
            max_rows=max_rows,
            ragged=self.partitioner.platform in ("tpu", "gpu"),
        )

    def _apply_experts(self, x_MD: jax.Array, weights: Mapping[str, jax.Array], sizes_E: jax.Array) -> jax.Array:
        """Applies the device's own experts to rows that are grouped by expert; `sizes_E` are the groups' sizes."""

        def multiply(x: jax.Array, name: str) -> jax.Array:
            y = grouped_dot(x, weights[name], sizes_E, platform=self.partitioner.platform)
            if name in self.adapters:
                y += self.adapters[name].grouped(x, weights[f"{name}_a"], weights[f"{name}_b"], sizes_E)
            if (bias := weights.get(f"{name}_bias")) is None:
                return y
            if name == "down":  # the output is summed over the shards of the hidden width
                bias /= self.partitioner.num_shards("mlp")
            expert_of_row = jnp.repeat(jnp.arange(len(bias)), sizes_E, total_repeat_length=len(y))
            return y + bias[expert_of_row]

        up_MF = name_tensor(save_dot(multiply(x_MD, "up")), "mlp_up")
        gate_MF = None if self.gate is None else name_tensor(save_dot(multiply(x_MD, "gate")), "mlp_gate")
        return multiply(activate(self.config.activation, gate_MF, up_MF), "down")

    def _layer_stats(
        self, logits_BTE: jax.Array, choice: ExpertChoice, mask_BTE: jax.Array, served_BTK: jax.Array
    ) -> LayerStats:
        """Sums stats over the device's tokens."""
        sharding, config = self.partitioner.sequence_sharding, self.config
        stats = {
            LOAD: jnp.sum(mask_BTE, axis=(0, 1), dtype=FLOAT32),
            SERVED: jnp.sum(served_BTK < config.num_experts, dtype=FLOAT32),
        }
        if config.balance_loss:
            loss = routing.load_balance_loss(mask_BTE, choice.scores, config.top_k, sharding)
            stats[BALANCE_LOSS] = config.balance_loss * loss
        if config.z_loss:
            stats[Z_LOSS] = config.z_loss * routing.router_z_loss(logits_BTE)
        same_tokens = self.partitioner.mesh_axes("mlp")
        if not same_tokens:
            return stats
        # Devices with parts of the same experts have the same tokens: only the first of them counts its tokens.
        is_first = jax.lax.axis_index(same_tokens) == 0
        return jax.lax.psum({name: jnp.where(is_first, a, 0) for name, a in stats.items()}, same_tokens)


def _of_all_layers(stats: LayerStats, name: str) -> list[jax.Array]:
    """Returns a statistic of each stack of layers; a layer of a period has its path before the name."""
    return [array for path, array in stats.items() if path.rpartition(".")[2] == name]


def aux_loss(stats: LayerStats, token_axes: tuple[str, ...]) -> jax.Array | None:
    """Sums the auxiliary losses of all layers: a scalar, unreduced over `token_axes`; None if there are no losses."""
    # Each is [L], or [L, S] in a pipeline.
    losses = [loss for name in (BALANCE_LOSS, Z_LOSS) for loss in _of_all_layers(stats, name)]
    if not losses:
        return None
    spec = jax.typeof(losses[0]).sharding.spec
    stage = tuple(axis for part in spec.partitions for axis in axis_names(part))

    def sum_local(*losses: jax.Array) -> jax.Array:
        total = reduce(jnp.add, [jnp.sum(loss) for loss in losses])
        return jax.lax.pcast(total, stage, to="unreduced") if stage else total

    in_specs = (spec,) * len(losses)
    return jax.shard_map(sum_local, in_specs=in_specs, out_specs=P(unreduced=frozenset(token_axes)))(*losses)


def metrics(stats: LayerStats, weight: jax.Array) -> dict[str, jax.Array]:
    """Returns scalars to log, from the stats of all layers, `[L, ...]`, and the weight of the batch's targets.

    Losses are divided by `weight`, like the training loss. Loads are relative to the mean of their layer: the maximum
    over layers and experts, and for each expert the mean over layers.
    """
    if not (loads := _of_all_layers(stats, LOAD)):
        return {}
    load_LE = loads[0] if len(loads) == 1 else jnp.concatenate(loads)
    relative_LE = load_LE / jnp.maximum(jnp.mean(load_LE, axis=1, keepdims=True), 1)
    totals = {name: [jnp.sum(a) for a in _of_all_layers(stats, name)] for name in (SERVED, BALANCE_LOSS, Z_LOSS)}
    sums = {name: reduce(jnp.add, parts) for name, parts in totals.items() if parts}
    scalars = {name: sums[name] / weight for name in (BALANCE_LOSS, Z_LOSS) if name in sums}
    scalars["expert_load_max"] = jnp.max(relative_LE)
    scalars["expert_dropped"] = 1 - sums[SERVED] / jnp.maximum(jnp.sum(load_LE), 1)
    return scalars | {f"expert_load/{expert}": load for expert, load in enumerate(jnp.mean(relative_LE, axis=0))}


def updated_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """Raises the bias of experts with less than their layer's mean load, and lowers the others (Wang et al. 2024)."""
    return bias_LE + rate * jnp.sign(jnp.mean(load_LE, axis=1, keepdims=True) - load_LE)
