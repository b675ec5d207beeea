"""The decoder-only transformer of a `TransformerConfig`.

The layers are a repeated period. Parameters are stacked by position in the period, and a scan applies a period in each
step: few arrays and short compiles, whatever the number of layers. There may be other layers before the first period
("prefix") and a last period that is cut short ("tail"): each is a `Stack` with a scan of its own.

Shape suffixes: B batch, T length, S pipeline stages, D residual width; 1 is a dimension that is broadcast.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxinfra.models import flops, moe
from jaxinfra.models.layers import Norm, ParamFactory, lookup_embeddings
from jaxinfra.models.mixer import TokenInfo
from jaxinfra.models.module import Inputs, LayeredModule, LayerStats, StageLayers
from jaxinfra.models.moe import MoE
from jaxinfra.models.mtp import MtpModule
from jaxinfra.models.period import (
    Block,
    LayerCache,
    Period,
    PeriodContext,
    build_period,
    layer_names,
    layers_of,
    prefixed,
)
from jaxinfra.models.stack import Step, scan_pattern, stack_trees, unstack
from jaxinfra.models.transformer import HasSeqLen, Stack, TransformerConfig
from jaxinfra.ops.context_cost import AttentionSizes, ContextChoice, choose_method, context_costs
from jaxinfra.ops.dropout import DROPOUT_FIELD, EMBEDDING_LAYER, dropout, layer_bits
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.ops.mtp import MTP_INPUTS, of_mtp
from jaxinfra.ops.rope import Rope, in_long_documents, rope_tables
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import ParamSpec, normal


def _keep_on_idle_stages(
    x_BTD: jax.Array, y_BTD: jax.Array, stats: LayerStats, index_S: jax.Array
) -> tuple[jax.Array, LayerStats]:
    """Returns the input and no statistics on the stages that have padding in place of a period (index -1)."""
    arrays = (y_BTD, stats)
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays)

    def select(arrays: tuple[jax.Array, LayerStats], x: jax.Array, index: jax.Array) -> tuple[jax.Array, LayerStats]:
        (y, stats), idle = arrays, index[0] < 0
        # The result of `where` has the sharding of its last argument, so stats come last to stay unreduced.
        return jnp.where(idle, x, y), {name: jnp.where(idle, 0, value) for name, value in stats.items()}

    mapped = jax.shard_map(select, in_specs=(specs, specs[0], P("stage")), out_specs=specs)
    return mapped(arrays, x_BTD, index_S)


class Cache(NamedTuple):
    """The decoding caches.

    Attributes:
        layers: caches by name of the stack and position in the period, `[times, B, ...]`.
        lengths: number of tokens of each row, int32 `[B]`.
    """

    layers: dict[str, tuple[LayerCache, ...]]
    lengths: jax.Array


class Transformer(LayeredModule):
    """A decoder from tokens to logits."""

    def __init__(self, config: TransformerConfig, partitioner: Partitioner):
        self.config, self.partitioner = config, partitioner
        hidden, vocab = config.hidden_size, config.vocab_size
        learned = config.learned_positions
        params, init = ParamFactory(partitioner=partitioner), normal(hidden**-0.5)
        param, tied = params.param, config.tie_embeddings
        self.embedding = param((vocab, hidden), ("vocab", "embed"), init, "embedding")
        table_init = normal(0.01)  # the scale of GPT-2's learned positions
        self.positions = param((learned, hidden), (None, "embed"), table_init, "embedding") if learned else None
        build = partial(build_period, config=config, params=params)
        self.prefix = None if config.prefix is None else build(config.prefix)
        self.blocks = build(config.blocks)
        self.tail = None if config.tail is None else build(config.tail)
        self.norm = Norm(hidden, config.norm, params=params)
        self.mtp = None if config.mtp_stack is None else MtpModule(config.mtp_stack, config, params)
        self.unembedding = None if tied else param((hidden, vocab), ("embed", "vocab"), init, "head", in_dims=1)

    @override
    def embed(self, batch: Inputs, /) -> jax.Array:
        """Embeds tokens and applies the layers before the first period: `[B, T, D]`.

        Args:
            batch: fields `[B, T]`, all but the first optional. "inputs": token ids in shard order. "positions":
                positions in the documents; without it, positions in the row. "segments": document ids, so that a token
                attends to its own document only; without it, a row is one document. "dropout": random bits (see
                `ops.dropout`).
        """
        x_BTD = self._embed_tokens(batch["inputs"], self._positions(batch))
        x_BTD = dropout(x_BTD, layer_bits(batch.get(DROPOUT_FIELD), EMBEDDING_LAYER), 0, self.config.dropout)
        return x_BTD if self.prefix is None else self._scan(x_BTD, batch, "prefix")[0]

    @override
    def apply_layers(
        self, x_BTD: jax.Array, batch: Inputs, stage_layers: StageLayers | None = None, /
    ) -> tuple[jax.Array, LayerStats]:
        x_BTD, stats = self._scan(x_BTD, batch, "blocks", stage_layers)
        if self.tail is None:
            return x_BTD, stats
        x_BTD, rest = self._scan(x_BTD, batch, "tail")
        return x_BTD, stats | prefixed(rest, "tail")

    @override
    def forward(self, batch: Inputs, /) -> tuple[FactoredLogits, LayerStats]:
        """Returns logits and statistics, with those of modules for multi-token prediction if the batch has fields."""
        x_BTD, stats = self.apply_layers(self.embed(batch), batch)
        logits = self.output(x_BTD)
        if self.mtp is None or MTP_INPUTS not in batch:
            return logits, stats
        hidden, rest = self._predict_later(x_BTD, batch, self.mtp)
        return replace(logits, mtp_hidden=hidden), stats | prefixed(rest, "mtp")

    @override
    def output(self, x_BTD: jax.Array, /) -> FactoredLogits:
        hidden_BTD = self._head_input(self.norm(x_BTD))
        if self.unembedding is None:
            head = self.partitioner.gather_weight(self.embedding[...], ("vocab", "embed")).T
        else:
            head = self.partitioner.gather_weight(self.unembedding[...], ("embed", "vocab"))
        return FactoredLogits(hidden=hidden_BTD, head=head, softcap=self.config.logit_softcap)

    def _head_input(self, hidden_BTD: jax.Array) -> jax.Array:
        hidden_BTD = self.partitioner.gather_sequence(hidden_BTD, "vocab")
        return hidden_BTD if self.config.logits_scaling == 1 else hidden_BTD / self.config.logits_scaling

    def _predict_later(
        self, x_BTD: jax.Array, batch: Inputs, modules: MtpModule
    ) -> tuple[tuple[jax.Array, ...], LayerStats]:
        """Returns the input of the head for each depth of multi-token prediction, and statistics."""
        stack = self.config.mtp_stack
        assert stack is not None
        tokens = TokenInfo(segments=batch.get("segments"), dropout_bits=batch.get(DROPOUT_FIELD))
        positions, policies = self._positions(batch), self.config.remat_policies
        # A module reads what the head reads of the depth before it, after the norm: of the main model as in vLLM's
        # deepseek_mtp and qwen3_next_mtp, of other modules as in transformers' `MtpModel`. The paper leaves both open.
        # vLLM passes hidden states on between DeepSeek's modules before the norm, but published models have one module.
        hidden_BTD, found, all_stats = self.norm(x_BTD), list[jax.Array](), list[LayerStats]()
        for depth, module in enumerate(unstack(modules, stack.times)):
            embedding_BTD = self._embed_tokens(batch[MTP_INPUTS][:, depth], positions)
            own = (policies[(stack.first + depth) % len(policies)],)
            context = replace(self._context(stack, positions, tokens), policies=own, alone=False)
            x_BTD = module.joined(embedding_BTD, hidden_BTD)
            x_BTD, _, stats = context.apply(module.block, x_BTD, jnp.asarray(depth))
            hidden_BTD = module.norm(x_BTD)
            found.append(self._head_input(hidden_BTD))
            all_stats.append(stats)
        return tuple(found), jax.tree.map(stack_trees, *all_stats)

    # Decoding

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Returns a cache for `length` tokens of `batch` rows."""
        layers = {
            name: tuple(block.attention.empty_cache(stack.times, batch, length) for block in layers_of(period, stack))
            for name, stack, period in self._stacks()
        }
        return Cache(layers, jnp.zeros(batch, jnp.int32, out_sharding=self.partitioner.spec("batch")))

    def decode(
        self, tokens_BT: jax.Array, cache: Cache, counts_B: jax.Array | None = None
    ) -> tuple[FactoredLogits, Cache]:
        """Returns logits for tokens that follow a cache, and the cache with these tokens.

        Each row of the cache and the tokens is one document. Of a row only the first `counts_B` tokens count, all by
        default. The others pad it: their logits mean nothing, and the next call overwrites them in the cache. A row
        that grows beyond one of `config.short_lengths` must be decoded again from its begin, with an empty cache.
        """
        partitioner, length = self.partitioner, tokens_BT.shape[1]
        tokens_BT = jax.reshard(tokens_BT, partitioner.spec("batch", None))
        all_B = jnp.full_like(cache.lengths, length)
        new_B = jax.reshard(all_B if counts_B is None else counts_B, partitioner.spec("batch"))
        positions_BT = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)
        x_BTD, caches = self._embed_tokens(tokens_BT, positions_BT), {}
        for name, stack, period in self._stacks():
            context = self._context(stack, positions_BT, TokenInfo(start=cache.lengths, counts=new_B))

            def step(x: jax.Array, xs: Any, context: PeriodContext = context) -> tuple[jax.Array, Any]:
                period, index, caches = xs
                x, new, _ = context.apply(period, x, index, caches)
                return x, new

            xs = (period, jnp.arange(stack.times), cache.layers[name])
            x_BTD, caches[name] = jax.lax.scan(step, x_BTD, xs, unroll=self.partitioner.unroll_loops)
        return self.output(x_BTD), Cache(caches, cache.lengths + new_B)

    # What is known about the model without arrays

    @override
    def uniform(self, layers: np.ndarray) -> bool:
        return bool((layers >= 0).all())  # all stages apply the same period, but padding applies none

    @override
    def flops(self, data: HasSeqLen) -> float:
        return data.seq_len * flops.flops_per_token(self.config, data.seq_len)

    @override
    def flops_of_changes(self, data: HasSeqLen, specs: Mapping[str, ParamSpec], base: Mapping[str, ParamSpec]) -> float:
        config, change = self.config, 0.0
        if not any(of_mtp(path) and spec.state == "trained" for path, spec in specs.items()):
            config = replace(config, mtp=None)  # modules that are not trained are not computed
            specs, base = ({path: spec for path, spec in each.items() if not of_mtp(path)} for each in (specs, base))
            change = flops.flops_per_token(config, data.seq_len) - flops.flops_per_token(self.config, data.seq_len)
        return data.seq_len * (change + flops.change_per_token(config, specs, base))

    @override
    def context_costs(self, data: HasSeqLen) -> Mapping[str, ContextChoice]:
        config, partitioner = self.config, self.partitioner
        sharding, method = partitioner.sequence_sharding, config.context_attention
        if sharding.num_shards == 1:
            return {}
        choices = {}
        for layer in config.training_layers:
            if (attention := layer.mixer.attention(config.hidden_size)) is None:
                continue
            spec, heads = attention
            sizes = AttentionSizes(
                batch=1,
                seq_len=data.seq_len,
                num_heads=heads.num_heads // partitioner.num_shards("heads"),
                num_kv_heads=heads.num_kv_heads // partitioner.num_shards("kv_heads"),
                head_dim=heads.head_dim,
                value_dim=heads.value_dim,
                itemsize=partitioner.compute_dtype.itemsize,
            )
            chosen = choose_method(sharding, spec, sizes) if method == "auto" else method
            name = "full" if spec.window is None else f"window {spec.window}"
            choices.setdefault(name, ContextChoice(chosen, context_costs(sharding, spec, sizes)))
        return choices

    # Statistics of the layers

    @override
    def aux_loss(self, stats: LayerStats) -> jax.Array | None:
        return moe.aux_loss(stats, (*self.partitioner.mesh_axes("batch"), *self.partitioner.mesh_axes("sequence")))

    @override
    def metrics(self, stats: LayerStats, weight: jax.Array) -> dict[str, jax.Array]:
        return moe.metrics(stats, weight)

    @override
    def update_buffers(self, stats: LayerStats) -> dict[str, Any]:
        buffers: dict[str, Any] = {}

        def updated(block: Block, *path: str) -> dict[str, Any]:
            name = ".".join(filter(None, (*path, moe.LOAD)))
            if not isinstance(block.mlp, MoE) or block.mlp.bias is None or name not in stats:  # not computed
                return {}
            rate = block.mlp.config.bias_update_rate
            return {"mlp": {"bias": moe.updated_bias(block.mlp.bias[...], stats[name], rate)}}

        for name, stack, period in self._stacks():
            for position, block in zip(layer_names(len(stack.layers)), layers_of(period, stack), strict=True):
                # As `apply_layers` names statistics.
                if new := updated(block, *(("tail", position) if name == "tail" else (position,))):
                    buffers.setdefault(name, {}).update({position: new} if position else new)
        if self.mtp is not None and (new := updated(self.mtp.block, "mtp")):
            buffers["mtp"] = {"block": new}
        return buffers

    # Embedding

    def _positions(self, batch: Inputs) -> jax.Array:
        """Returns the position of each token in its document, `[B or 1, T]`."""
        if "positions" in batch:
            return batch["positions"]
        positions_1T = self.partitioner.sequence_sharding.positions(batch["inputs"].shape[1])[None]
        return jax.reshard(positions_1T, self.partitioner.spec(None, "sequence"))

    def _embed_tokens(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Looks up the embeddings of tokens, and of positions if they are learned."""
        partitioner = self.partitioner
        x_BTD = lookup_embeddings(self.embedding[...], tokens_BT, partitioner)
        if self.positions is not None:
            table = partitioner.gather_weight(self.positions[...], (None, "embed"))
            index = jax.reshard(jnp.broadcast_to(positions_BT, tokens_BT.shape), partitioner.spec("batch", "sequence"))
            x_BTD += table.at[index].get(out_sharding=partitioner.spec("batch", "sequence", None))
        if self.config.scale_embeddings:
            x_BTD *= jnp.asarray(self.config.hidden_size**0.5, x_BTD.dtype)
        if self.config.embedding_multiplier != 1:
            x_BTD *= self.config.embedding_multiplier
        return partitioner.shard(x_BTD, "batch", "positions", None)

    # Layers

    def _stacks(self) -> list[tuple[str, Stack, Block | Period]]:
        """Returns the stacks of layers in order: their names, configs and stacked parameters."""
        named = ((name, getattr(self.config, name), getattr(self, name)) for name in ("prefix", "blocks", "tail"))
        return [(name, stack, period) for name, stack, period in named if stack is not None]

    def _context(self, stack: Stack, positions_BT: jax.Array, tokens: TokenInfo) -> PeriodContext:
        """Computes the rotary positions once for all layers of a stack, which share what has the same config."""
        tables: dict[tuple[Rope, int] | None, Any] = {None: None}
        for rotary in {layer.mixer.rotary(self.config.hidden_size): None for layer in stack.layers}:
            if rotary is not None:
                (rope, head_dim), dtype = rotary, self.partitioner.compute_dtype
                is_long = None if rope.short_length is None else self._is_long(rope.short_length, positions_BT, tokens)
                tables[rotary] = rope_tables(rope, positions_BT, head_dim, dtype, is_long)
        return PeriodContext(stack=stack, tokens=tokens._replace(positions=positions_BT), tables=tables)

    def _is_long(self, length: int, positions_BT: jax.Array, tokens: TokenInfo) -> jax.Array:
        """Returns which tokens are in documents longer than `length`, `[B or 1, T or 1]`.

        What counts is the length of the document in its row; with a cache, it includes the new tokens.
        """
        if tokens.start is not None:
            assert tokens.counts is not None
            return (tokens.start + tokens.counts > length)[:, None]
        size, sharding = positions_BT.shape[1], self.partitioner.sequence_sharding
        if tokens.segments is None or size <= length:
            return jnp.full((1, 1), size > length)
        if sharding.num_shards == 1:
            return in_long_documents(positions_BT, tokens.segments, length)
        rows, spec = [positions_BT, tokens.segments], jax.typeof(tokens.segments).sharding.spec
        for index, row in enumerate(rows):  # gathered, since a document may be on several shards
            whole = jax.reshard(row, P(jax.typeof(row).sharding.spec.partitions[0], None))
            rows[index] = sharding.to_natural_order(whole, 1)
        return jax.reshard(sharding.to_shard_order(in_long_documents(*rows, length=length), 1), spec)

    def _scan(
        self, x_BTD: jax.Array, batch: Inputs, name: str, stage_layers: StageLayers | None = None
    ) -> tuple[jax.Array, LayerStats]:
        """Applies the layers of a stack; the remat policies are repeated over them."""
        stack, policies = getattr(self.config, name), self.config.remat_policies
        tokens = TokenInfo(segments=batch.get("segments"), dropout_bits=batch.get(DROPOUT_FIELD))
        context, period = self._context(stack, self._positions(batch), tokens), len(stack.layers)
        unroll = self.partitioner.unrolls_layers(period * stack.times)
        pattern_layers = math.lcm(period, len(policies))  # after these layers both configs and policies repeat

        def make_step(first: int) -> Step:
            own = tuple(policies[(first + position) % len(policies)] for position in range(period))
            apply = replace(context, policies=own, alone=pattern_layers == 1 and not unroll).apply

            def step(x: jax.Array, xs: tuple[Block | Period, jax.Array]) -> tuple[jax.Array, LayerStats]:
                layers, index = xs
                y, _, stats = apply(layers, x, index)
                if stage_layers is None or stage_layers.uniform:
                    return y, stats
                return _keep_on_idle_stages(x, y, stats, index)

            return step

        indices = jnp.arange(stack.times) if stage_layers is None else stage_layers.indices
        steps = [make_step(first) for first in range(0, pattern_layers, period)]
        return scan_pattern(steps, x_BTD, (getattr(self, name), indices), unroll=unroll)
