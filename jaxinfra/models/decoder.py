"""The decoder-only transformer of a `TransformerConfig`.

Layers are stacked and scanned, for few arrays and short compiles. Layers of different types (full or sliding attention)
have the same parameters, and the scan's body switches between the types.

Shape suffixes: B batch, T length, L layers, S pipeline stages, D residual width, V vocabulary.
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
from jaxinfra.models.layers import MLP, Norm, ParamFactory
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
type LayerFunction = Callable[["Block", jax.Array, jax.Array, LayerCache], tuple[jax.Array, LayerCache, LayerStats]]
"""`(block, activations, layer index, cache) -> (activations, cache, stats)`."""

type AnyLayerFunction = Callable[..., tuple[jax.Array, LayerCache, LayerStats]]
"""`(block, activations, index of the layer type, layer index, cache) -> (activations, cache, stats)`."""


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
        self, x_BTD: jax.Array, spec: AttentionSpec, tokens: TokenInfo, bits_BT: jax.Array | None, cache: Any
    ) -> tuple[jax.Array, LayerCache, LayerStats]:
        """Returns the residual stream, cache and stats; `bits_BT` are the dropout bits of the layer."""
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
    return Norm(
        config.hidden_size,
        norm_type=config.norm_type,
        eps=config.norm_eps,
        offset=config.norm_offset,
        params=params,
    )


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


class LayerInputs(NamedTuple):
    """Inputs that all layers of a call share.

    Attributes:
        positions: positions of the tokens in their documents, `[B or 1, T]`.
        segments: see `TokenInfo`.
        start: see `TokenInfo`.
        dropout_bits: see `ops.dropout`; None drops nothing.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    start: jax.Array | None = None
    dropout_bits: jax.Array | None = None


class LayerIds(NamedTuple):
    """The layers of a scan, `[L]`, or `[L, S]` if the S pipeline stages differ.

    Attributes:
        types: index into `distinct_layer_types`; -1 is padding.
        indices: layer index; the dense layers before the stack have the indices up to -1.
    """

    types: jax.Array
    indices: jax.Array


class Cache(NamedTuple):
    """The decoding cache of all layers, and its number of tokens (an int32 scalar)."""

    kv: KVCache | LatentCache
    length: jax.Array


class Transformer(LayeredModule):
    """A decoder from tokens to hidden states; `head` is the weight of the LM head."""

    def __init__(self, config: TransformerConfig, partitioner: Partitioner):
        self.config, self.partitioner = config, partitioner
        params, hidden = ParamFactory(partitioner=partitioner), config.hidden_size
        vocab, learned, dense = config.vocab_size, config.learned_positions, config.num_dense_layers
        init = normal(hidden**-0.5)
        self.embedding = params.param((vocab, hidden), ("vocab", "embed"), init, "embedding")
        self.positions = (
            params.param((learned, hidden), (None, "embed"), normal(0.01), "embedding") if learned else None
        )
        self.prefix = Block(replace(config, moe=None), replace(params, num_layers=dense)) if dense else None
        self.blocks = Block(config, replace(params, num_layers=config.num_layers))
        self.norm = _norm(config, params)
        self.unembedding = (
            None
            if config.tie_embeddings
            else params.param((hidden, vocab), ("embed", "vocab"), init, "head", in_dims=1)
        )

    def hidden_states(self, batch: Inputs) -> jax.Array:
        """Returns the hidden states after the final norm, `[B, T, D]`; see `embed` for the batch."""
        return self.final_norm(self.apply_layers(self.embed(batch), batch)[0])

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns hidden states after the final norm for tokens that follow a cache, and the cache with these tokens.

        Each row of the cache and the tokens is one document.
        """
        positions_BT = cache.length + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        inputs = LayerInputs(positions_BT, start=cache.length)
        layer = self._layer(inputs, uniform=True, policy="none")

        def body(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            block, ids, kv = xs
            x, kv, _ = layer(block, x, *ids, kv)
            return x, kv

        x_BTD, dense = self._embed_tokens(tokens_BT, positions_BT), self.config.num_dense_layers
        if self.prefix is None:
            x_BTD, kv = jax.lax.scan(body, x_BTD, (self.blocks, self._layer_ids(), cache.kv))
        else:
            dense_kv, kv = (jax.tree.map(lambda a, i=i: jnp.split(a, [dense])[i], cache.kv) for i in (0, 1))
            x_BTD, dense_kv = jax.lax.scan(body, x_BTD, (self.prefix, self._dense_layer_ids(), dense_kv))
            x_BTD, kv = jax.lax.scan(body, x_BTD, (self.blocks, self._layer_ids(), kv))
            kv = jax.tree.map(lambda *parts: jnp.concatenate(parts), dense_kv, kv)
        return self.final_norm(x_BTD), Cache(kv, cache.length + tokens_BT.shape[1])

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
        return self._scan(x_BTD, batch, self.prefix, self._dense_layer_ids(), uniform=True)[0]

    @override
    def apply_layers(
        self, x_BTD: jax.Array, batch: Inputs, stage_layers: StageLayers | None = None, /
    ) -> tuple[jax.Array, LayerStats]:
        uniform = stage_layers is None or stage_layers.uniform
        return self._scan(x_BTD, batch, self.blocks, self._layer_ids(stage_layers), uniform=uniform)

    def _scan(
        self, x_BTD: jax.Array, batch: Inputs, blocks: Block, ids: LayerIds, *, uniform: bool
    ) -> tuple[jax.Array, LayerStats]:
        inputs = LayerInputs(self._positions(batch), batch.get("segments"), dropout_bits=batch.get(DROPOUT_FIELD))

        def step(policy: Remat) -> Step:
            layer = self._layer(inputs, uniform=uniform, policy=policy)

            def apply(x: jax.Array, xs: tuple[Block, LayerIds]) -> tuple[jax.Array, LayerStats]:
                block, (layer_type, index) = xs
                x, _, stats = layer(block, x, layer_type, index, None)
                return x, stats

            return apply

        return scan_pattern([step(policy) for policy in self.config.remat_policies], x_BTD, (blocks, ids))

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        """Applies the norm after the last layer and all-gathers positions for the LM head."""
        return self.partitioner.gather_sequence(self.norm(x_BTD), "vocab")

    @override
    def output(self, x_BTD: jax.Array, /) -> FactoredLogits:
        return FactoredLogits(hidden=self.final_norm(x_BTD), head=self.head(), softcap=self.config.logit_softcap)

    @override
    def uniform(self, layers: np.ndarray) -> bool:
        config = self.config
        types = [config.layer_type(config.num_dense_layers + n) if n >= 0 else None for n in layers.flat]
        # Row l has the types of layer l of every chunk on every stage.
        rows = np.array(types, object).reshape(layers.shape).transpose(1, 0, 2).reshape(layers.shape[1], -1)
        return bool((rows == rows[:, :1]).all())

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

    @override
    def aux_loss(self, stats: LayerStats) -> jax.Array | None:
        return moe.aux_loss(stats, (*self.partitioner.mesh_axes("batch"), *self.partitioner.mesh_axes("sequence")))

    @override
    def metrics(self, stats: LayerStats, weight: jax.Array) -> dict[str, jax.Array]:
        return moe.metrics(stats, weight)

    @override
    def update_buffers(self, stats: LayerStats) -> dict[str, Any]:
        mlp = self.blocks.mlp
        if self.config.moe is None or not isinstance(mlp, MoE) or mlp.bias is None:
            return {}
        bias = moe.updated_bias(mlp.bias[...], stats, self.config.moe.bias_update_rate)
        return {"blocks": {"mlp": {"bias": bias}}}

    def _positions(self, batch: Inputs) -> jax.Array:
        if "positions" in batch:
            return batch["positions"]
        positions_1T = self.partitioner.sequence_sharding.positions(batch["inputs"].shape[1])[None]
        return jax.reshard(positions_1T, self.partitioner.spec(None, "sequence"))

    def _layer_types(self, layers: range) -> jax.Array:
        types = self.config.distinct_layer_types
        return jnp.array([types.index(self.config.layer_type(layer)) for layer in layers])

    def _layer_ids(self, stage_layers: StageLayers | None = None) -> LayerIds:
        types = self._layer_types(range(self.config.num_dense_layers, self.config.total_layers))
        if stage_layers is None:
            return LayerIds(types, jnp.arange(self.config.num_layers))
        indices = stage_layers.indices
        types = jnp.where(indices < 0, -1, types.at[indices].get(out_sharding=P(None, "stage")))
        return LayerIds(jax.reshard(types, P())[:, 0] if stage_layers.uniform else types, indices)

    def _dense_layer_ids(self) -> LayerIds:
        dense = self.config.num_dense_layers
        return LayerIds(self._layer_types(range(dense)), jnp.arange(-dense, 0))

    def _layer(self, inputs: LayerInputs, *, uniform: bool, policy: Remat) -> AnyLayerFunction:
        """Returns a function that applies a layer of any type; `uniform` is explained at `StageLayers`."""
        branches = [self._layer_of_type(layer_type, inputs, policy) for layer_type in self.config.distinct_layer_types]
        if not uniform:
            return lambda block, x, layer_type, index, cache: self._apply_all(branches, block, x, layer_type, index)
        if len(branches) == 1:
            return lambda block, x, layer_type, index, cache: branches[0](block, x, index, cache)
        return lambda block, x, layer_type, index, cache: jax.lax.switch(layer_type, branches, block, x, index, cache)

    def _layer_of_type(self, layer_type: LayerType, inputs: LayerInputs, policy: Remat) -> LayerFunction:
        config, rope = self.config, self.config.rope_of(layer_type)
        tables = None
        if rope is not None:
            tables = rope_tables(rope, inputs.positions, config.rope_head_dim, self.partitioner.compute_dtype)
        tokens = TokenInfo(tables, inputs.segments, inputs.start)

        def layer(
            block: Block, x: jax.Array, index: jax.Array, cache: LayerCache
        ) -> tuple[jax.Array, LayerCache, LayerStats]:
            bits = layer_bits(inputs.dropout_bits, index + config.num_dense_layers)
            return block(x, config.attention_spec(layer_type), tokens, bits, cache)

        return remat(layer, policy, alone=len(config.remat_policies) == 1)

    def _apply_all(
        self, branches: Sequence[LayerFunction], block: Block, x_BTD: jax.Array, type_S: jax.Array, index_S: jax.Array
    ) -> tuple[jax.Array, None, LayerStats]:
        """Applies layers of different types on different pipeline stages: computes all types, then selects by stage.

        A stage without a layer (type -1) returns its input.
        """
        results = [branch(block, x_BTD, index_S, None) for branch in branches]
        outputs = [(y_BTD, stats) for y_BTD, _, stats in results]
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, outputs)

        def select(
            outputs: list[tuple[jax.Array, LayerStats]], x: jax.Array, type_of_stage: jax.Array
        ) -> tuple[jax.Array, LayerStats]:
            selected = []
            for layer_type, (y, stats) in enumerate(outputs):
                other = type_of_stage[0] != layer_type
                x = jnp.where(other, x, y)
                # The result of `where` has the sharding of its last argument, so stats come last to stay unreduced.
                selected.append(jax.tree.map(lambda a, other=other: jnp.where(other, 0, a), stats))
            return x, jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *selected)

        mapped = jax.shard_map(select, in_specs=(specs, specs[0][0], P("stage")), out_specs=specs[0])
        y_BTD, stats = mapped(outputs, x_BTD, type_S)
        return y_BTD, None, stats

    def _embed_tokens(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Looks up the embeddings of tokens, and of positions if they are learned."""
        partitioner = self.partitioner
        x_BTD = self._lookup(tokens_BT)
        if self.positions is not None:
            table = partitioner.gather_weight(self.positions[...], (None, "embed"))
            index = jax.reshard(jnp.broadcast_to(positions_BT, tokens_BT.shape), partitioner.spec("batch", "sequence"))
            x_BTD += table.at[index].get(out_sharding=partitioner.spec("batch", "sequence", None))
        if self.config.scale_embeddings:
            x_BTD *= jnp.asarray(self.config.hidden_size**0.5, x_BTD.dtype)
        return partitioner.shard(x_BTD, "batch", "positions", None)

    def _lookup(self, tokens_BT: jax.Array) -> jax.Array:
        partitioner, axes = self.partitioner, self.partitioner.mesh_axes("vocab")
        if not axes:
            # Each device looks up its columns for all tokens, then tokens are exchanged: fewer bytes than the table.
            table_VD, out = partitioner.lookup_table(self.embedding[...], "embed")
            tokens_BT = jax.reshard(tokens_BT, P(*out.partitions[:2]))
            return partitioner.reshard_to_tokens(table_VD.at[tokens_BT].get(out_sharding=out), "embed")
        table_VD = partitioner.gather_weight(self.embedding[...], ("vocab", "embed"))

        def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
            # Each vocabulary shard looks up its own tokens and returns zeros for others.
            tokens = tokens - jax.lax.axis_index(axes) * table.shape[0]
            own = (tokens >= 0) & (tokens < table.shape[0])
            rows = table[jnp.where(own, tokens, 0)]
            return jax.lax.psum(jnp.where(own[..., None], rows, 0), axes)

        in_specs = tuple(jax.typeof(a).sharding.spec for a in (table_VD, tokens_BT))
        out_specs = partitioner.spec("batch", "sequence", None)
        return jax.shard_map(lookup, in_specs=in_specs, out_specs=out_specs)(table_VD, tokens_BT)

    def head(self) -> jax.Array:
        """Returns the weight of the LM head, `[D, V]`, gathered for use."""
        if self.unembedding is None:
            return self.partitioner.gather_weight(self.embedding[...], ("vocab", "embed")).T
        return self.partitioner.gather_weight(self.unembedding[...], ("embed", "vocab"))

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Returns a cache for `length` tokens of `batch` rows."""
        kv = self.blocks.attention.empty_cache(self.config.total_layers, batch, length)
        return Cache(kv, jnp.zeros((), jnp.int32))
