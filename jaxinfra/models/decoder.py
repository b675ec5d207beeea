"""The decoder-only transformer of a `TransformerConfig`.

Layers are stacked and scanned, for few arrays and short compiles. Layers of different types (full or sliding attention)
have the same parameters, and the scan's body switches between the types.

Shape suffixes: B batch, T length, L layers, S pipeline stages, D residual width.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfra.models import flops, moe
from jaxinfra.models.attention import Attention, AttentionConfig, KVCache, TokenInfo
from jaxinfra.models.latent import LatentAttention, LatentCache
from jaxinfra.models.layers import MLP, Norm, ParamFactory, lookup_embeddings
from jaxinfra.models.module import Inputs, LayeredModule, LayerStats, StageLayers
from jaxinfra.models.moe import MoE
from jaxinfra.models.remat import Remat, remat
from jaxinfra.models.stack import Step, scan_pattern
from jaxinfra.models.transformer import HasSeqLen, LayerType, TransformerConfig
from jaxinfra.ops.attention import AttentionSpec
from jaxinfra.ops.context_cost import AttentionSizes, ContextChoice, choose_method, context_costs
from jaxinfra.ops.dropout import DROPOUT_FIELD, EMBEDDING_LAYER, dropout, layer_bits
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.ops.rope import rope_tables
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import normal

type LayerCache = KVCache | LatentCache | None


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm; their outputs are added to the residual stream."""

    def __init__(self, config: TransformerConfig, params: ParamFactory):
        self.partitioner, self.dropout = params.partitioner, config.dropout
        norm = partial(_norm, config, params)
        # Each layer adds two outputs to the residual stream. As in GPT-2, this scale keeps its variance near one.
        out_scale = (2 * config.total_layers) ** -0.5
        self.attention_norm = norm()
        self.attention = _attention(config, out_scale, params)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        options = {"mlp_type": config.mlp_type, "out_scale": out_scale, "params": params}
        if config.moe is None:
            self.mlp = MLP(config.hidden_size, config.mlp_dim, bias=config.mlp_bias, **options)
        else:
            self.mlp = MoE(config.hidden_size, config.mlp_dim, config.moe, **options)
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self, x_BTD: jax.Array, spec: AttentionSpec, tokens: TokenInfo, layer_index: jax.Array, cache: Any
    ) -> tuple[jax.Array, LayerCache, LayerStats]:
        """Returns the residual stream after the layer, the cache with these tokens, and the layer's statistics."""
        bits_BT = layer_bits(tokens.dropout_bits, layer_index)
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), spec, tokens, cache)
        if self.attention_post_norm is not None:
            y_BTD = self.attention_post_norm(y_BTD)
        x_BTD += dropout(y_BTD, bits_BT, 0, self.dropout)
        y_BTD, stats = self.partitioner.gather_sequence(self.mlp_norm(x_BTD), "mlp"), {}
        if isinstance(self.mlp, MoE):
            y_BTD, stats = self.mlp(y_BTD, drop_tokens=cache is None)  # decoding never drops tokens
        else:
            y_BTD = self.mlp(y_BTD)
        if self.mlp_post_norm is not None:
            y_BTD = self.mlp_post_norm(y_BTD)
        x_BTD += dropout(y_BTD, bits_BT, 1, self.dropout)
        return self.partitioner.row_major(x_BTD), cache, stats


def _norm(config: TransformerConfig, params: ParamFactory) -> Norm:
    options = {"norm_type": config.norm_type, "eps": config.norm_eps, "offset": config.norm_offset}
    return Norm(config.hidden_size, params=params, **options)


def _attention(config: TransformerConfig, out_scale: float, params: ParamFactory) -> Attention | LatentAttention:
    attention = AttentionConfig(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.kv_head_count,
        head_dim=config.qk_head_dim,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        norm_offset=config.norm_offset,
        out_scale=out_scale,
        kernel=config.attention_kernel,
        context_method=config.context_attention,
    )
    return Attention(attention, params) if config.mla is None else LatentAttention(config.mla, attention, params)


class LayerIds(NamedTuple):
    """The type and the index of layers: `[L]` for a scan, or `[L, S]` if S pipeline stages apply different layers.

    Attributes:
        types: index into `TransformerConfig.distinct_layer_types`; -1 is padding.
        indices: layer index, counted from the first dense layer.
    """

    types: jax.Array
    indices: jax.Array


type LayerFunction = Callable[[Block, jax.Array, LayerIds, LayerCache], tuple[jax.Array, LayerCache, LayerStats]]
"""Applies one layer to activations; returns activations, cache and statistics."""


class Cache(NamedTuple):
    """The decoding cache of all layers, and its number of tokens (an int32 scalar)."""

    kv: KVCache | LatentCache
    length: jax.Array


class Transformer(LayeredModule):
    """A decoder from tokens to logits."""

    def __init__(self, config: TransformerConfig, partitioner: Partitioner):
        self.config, self.partitioner = config, partitioner
        hidden, vocab = config.hidden_size, config.vocab_size
        learned, dense = config.learned_positions, config.num_dense_layers
        params, init = ParamFactory(partitioner=partitioner), normal(hidden**-0.5)
        param, tied = params.param, config.tie_embeddings
        # Indices of the layers in `prefix`, which have an MLP in place of experts, and of those in `blocks`.
        self._dense_layers, self._stacked_layers = range(dense), range(dense, config.total_layers)
        self.embedding = param((vocab, hidden), ("vocab", "embed"), init, "embedding")
        self.positions = param((learned, hidden), (None, "embed"), normal(0.01), "embedding") if learned else None
        self.prefix = Block(replace(config, moe=None), replace(params, num_layers=dense)) if dense else None
        self.blocks = Block(config, replace(params, num_layers=config.num_layers))
        self.norm = _norm(config, params)
        self.unembedding = None if tied else param((hidden, vocab), ("embed", "vocab"), init, "head", in_dims=1)

    @override
    def embed(self, batch: Inputs, /) -> jax.Array:
        """Embeds tokens and applies the dense layers before the stack: `[B, T, D]`.

        Args:
            batch: fields `[B, T]`, all but the first optional. "inputs": token ids in shard order. "positions":
                positions in the documents; without it, positions in the row. "segments": document ids, so that a token
                attends to its own document only; without it, a row is one document. "dropout": random bits (see
                `ops.dropout`).
        """
        x_BTD = self._embed_tokens(batch["inputs"], self._positions(batch))
        x_BTD = dropout(x_BTD, layer_bits(batch.get(DROPOUT_FIELD), EMBEDDING_LAYER), 0, self.config.dropout)
        if self.prefix is None:
            return x_BTD
        return self._scan(x_BTD, batch, self.prefix, self._layer_ids(self._dense_layers), uniform=True)[0]

    @override
    def apply_layers(
        self, x_BTD: jax.Array, batch: Inputs, stage_layers: StageLayers | None = None, /
    ) -> tuple[jax.Array, LayerStats]:
        ids, uniform = self._layer_ids(self._stacked_layers), True
        if stage_layers is not None:
            ids, uniform = self._ids_of_stages(ids, stage_layers), stage_layers.uniform
        return self._scan(x_BTD, batch, self.blocks, ids, uniform=uniform)

    @override
    def output(self, x_BTD: jax.Array, /) -> FactoredLogits:
        hidden_BTD = self.partitioner.gather_sequence(self.norm(x_BTD), "vocab")
        if self.unembedding is None:
            head = self.partitioner.gather_weight(self.embedding[...], ("vocab", "embed")).T
        else:
            head = self.partitioner.gather_weight(self.unembedding[...], ("embed", "vocab"))
        return FactoredLogits(hidden=hidden_BTD, head=head, softcap=self.config.logit_softcap)

    # Decoding

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Returns a cache for `length` tokens of `batch` rows."""
        kv = self.blocks.attention.empty_cache(self.config.total_layers, batch, length)
        return Cache(kv, jnp.zeros((), jnp.int32))

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[FactoredLogits, Cache]:
        """Returns logits for tokens that follow a cache, and the cache with these tokens.

        Each row of the cache and the tokens is one document.
        """
        positions_1T = cache.length + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        layer = self._layer(positions_1T, TokenInfo(start=cache.length), uniform=True, policy="none")

        def body(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            block, ids, kv = xs
            x, kv, _ = layer(block, x, ids, kv)
            return x, kv

        x_BTD, new_kv = self._embed_tokens(tokens_BT, positions_1T), []  # the caches of `prefix` and of `blocks`
        for blocks, layers in ((self.prefix, self._dense_layers), (self.blocks, self._stacked_layers)):
            if blocks is not None:
                select = partial(jax.lax.slice_in_dim, start_index=layers.start, limit_index=layers.stop)
                kv = jax.tree.map(select, cache.kv)
                x_BTD, kv = jax.lax.scan(body, x_BTD, (blocks, self._layer_ids(layers), kv))
                new_kv.append(kv)
        kv = jax.tree.map(lambda *parts: jnp.concatenate(parts), *new_kv)
        return self.output(x_BTD), Cache(kv, cache.length + tokens_BT.shape[1])

    # What is known about the model

    @override
    def uniform(self, layers: np.ndarray) -> bool:
        config = self.config

        def type_of(layer: int) -> LayerType | None:
            return None if layer < 0 else config.layer_type(config.num_dense_layers + layer)

        # Stages may work on different chunks at a time, so layer n of every chunk of every stage must have one type.
        return all(len({type_of(layer) for layer in layers[:, n].flat}) == 1 for n in range(layers.shape[1]))

    @override
    def flops(self, data: HasSeqLen) -> float:
        return data.seq_len * flops.flops_per_token(self.config, data.seq_len)

    @override
    def context_costs(self, data: HasSeqLen) -> Mapping[str, ContextChoice]:
        config, partitioner = self.config, self.partitioner
        sharding, method = partitioner.sequence_sharding, config.context_attention
        if sharding.num_shards == 1:
            return {}
        sizes = AttentionSizes(
            batch=1,
            seq_len=data.seq_len,
            num_heads=config.num_heads // partitioner.num_shards("heads"),
            num_kv_heads=config.kv_head_count // partitioner.num_shards("kv_heads"),
            head_dim=config.qk_head_dim,
            value_dim=config.v_head_dim,
            itemsize=partitioner.compute_dtype.itemsize,
        )
        choices = {}
        for layer_type in config.distinct_layer_types:
            spec = config.attention_spec(layer_type)
            chosen = choose_method(sharding, spec, sizes) if method == "auto" else method
            choices[layer_type] = ContextChoice(chosen, context_costs(sharding, spec, sizes))
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
        mlp = self.blocks.mlp
        if not isinstance(mlp, MoE) or mlp.bias is None:
            return {}
        bias = moe.updated_bias(mlp.bias[...], stats, mlp.config.bias_update_rate)
        return {"blocks": {"mlp": {"bias": bias}}}

    # Embedding

    def _positions(self, batch: Inputs) -> jax.Array:
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
        return partitioner.shard(x_BTD, "batch", "positions", None)

    # Layers

    def _layer_ids(self, layers: range) -> LayerIds:
        types = self.config.distinct_layer_types
        return LayerIds(
            types=jnp.array([types.index(self.config.layer_type(layer)) for layer in layers]),
            indices=jnp.arange(layers.start, layers.stop),
        )

    def _ids_of_stages(self, ids: LayerIds, stage_layers: StageLayers) -> LayerIds:
        """Selects the layers of each stage, `[L, S]`; types that are equal on all stages become `[L]`."""
        in_stack_LS = stage_layers.indices
        types_LS = jnp.where(in_stack_LS < 0, -1, ids.types.at[in_stack_LS].get(out_sharding=P(None, "stage")))
        types = jax.reshard(types_LS, P())[:, 0] if stage_layers.uniform else types_LS
        return LayerIds(types, in_stack_LS + self.config.num_dense_layers)

    def _scan(
        self, x_BTD: jax.Array, batch: Inputs, blocks: Block, ids: LayerIds, *, uniform: bool
    ) -> tuple[jax.Array, LayerStats]:
        """Applies stacked layers; the remat policies are repeated over them."""
        tokens = TokenInfo(segments=batch.get("segments"), dropout_bits=batch.get(DROPOUT_FIELD))
        positions_BT = self._positions(batch)

        def make_step(policy: Remat) -> Step:
            layer = self._layer(positions_BT, tokens, uniform=uniform, policy=policy)

            def step(x: jax.Array, xs: tuple[Block, LayerIds]) -> tuple[jax.Array, LayerStats]:
                block, ids = xs
                x, _, stats = layer(block, x, ids, None)
                return x, stats

            return step

        return scan_pattern([make_step(policy) for policy in self.config.remat_policies], x_BTD, (blocks, ids))

    def _layer(self, positions_BT: jax.Array, tokens: TokenInfo, *, uniform: bool, policy: Remat) -> LayerFunction:
        """Returns a function that applies a layer of any type; `uniform` is explained at `StageLayers`."""
        by_type = [self._layer_of_type(t, positions_BT, tokens, policy) for t in self.config.distinct_layer_types]
        if not uniform:
            return partial(self._select_by_stage, by_type)
        if len(by_type) == 1:
            return by_type[0]
        return lambda block, x, ids, cache: jax.lax.switch(ids.types, by_type, block, x, ids, cache)

    def _layer_of_type(
        self, layer_type: LayerType, positions_BT: jax.Array, tokens: TokenInfo, policy: Remat
    ) -> LayerFunction:
        config, rope = self.config, self.config.rope_of(layer_type)
        if rope is not None:
            tables = rope_tables(rope, positions_BT, config.rope_head_dim, self.partitioner.compute_dtype)
            tokens = tokens._replace(rope=tables)

        def layer(
            block: Block, x_BTD: jax.Array, ids: LayerIds, cache: LayerCache
        ) -> tuple[jax.Array, LayerCache, LayerStats]:
            return block(x_BTD, config.attention_spec(layer_type), tokens, ids.indices, cache)

        return remat(layer, policy, alone=len(config.remat_policies) == 1)

    def _select_by_stage(
        self, by_type: Sequence[LayerFunction], block: Block, x_BTD: jax.Array, ids_S: LayerIds, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache, LayerStats]:
        """Applies layers of different types on different pipeline stages: computes all types, then selects by stage.

        A stage without a layer (type -1) returns its input.
        """
        results = [layer(block, x_BTD, ids_S, None) for layer in by_type]
        outputs = [(y_BTD, stats) for y_BTD, _, stats in results]
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, outputs)

        def select(
            outputs: list[tuple[jax.Array, LayerStats]], x: jax.Array, type_of_stage: jax.Array
        ) -> tuple[jax.Array, LayerStats]:
            selected_stats = []
            for layer_type, (y, stats) in enumerate(outputs):
                other = type_of_stage[0] != layer_type
                x = jnp.where(other, x, y)
                # The result of `where` has the sharding of its last argument, so stats come last to stay unreduced.
                selected_stats.append({name: jnp.where(other, 0, value) for name, value in stats.items()})
            return x, jax.tree.map(lambda *of_types: functools.reduce(jnp.add, of_types), *selected_stats)

        mapped = jax.shard_map(select, in_specs=(specs, specs[0][0], P("stage")), out_specs=specs[0])
        y_BTD, stats = mapped(outputs, x_BTD, ids_S.types)
        return y_BTD, cache, stats
