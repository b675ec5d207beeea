"""A decoder-only transformer, as its config says (`models.transformer`).

Layers are stacked and scanned: few arrays, short compiles. Layers of different sight (sliding window or whole
length) have the same parameters and differ by a branch inside the scan.

Shape suffixes: B batch, T length, L layers, D residual width, V vocabulary, S cache length.
"""

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
from jaxinfra.models.attention import KV, Attention, AttentionShape, Place
from jaxinfra.models.latent import LatentAttention, Latents
from jaxinfra.models.layers import MLP, Norm, Stack
from jaxinfra.models.module import Inputs, LayeredModule, LayerStats, StageLayers
from jaxinfra.models.moe import MoE
from jaxinfra.models.remat import Remat, remat
from jaxinfra.models.stack import Step, scan_pattern
from jaxinfra.models.transformer import Sequences, Sight, TransformerConfig
from jaxinfra.ops.attention import AttentionSpec
from jaxinfra.ops.context_cost import AttentionSizes, ContextChoice, choose_method, context_costs
from jaxinfra.ops.dropout import DROPOUT_FIELD, EMBEDDING_LAYER, dropout, layer_bits
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.ops.rope import rope_tables
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import normal

type Layer = Callable[..., tuple[jax.Array, Any, LayerStats]]
"""`(block, stream, kind, number, cache) -> (stream, cache, stats)`; without the kind if it is of one."""


class Block(nnx.Module):
    """Attention and MLP, each read from a norm of the residual stream and added back to it."""

    def __init__(self, config: TransformerConfig, stack: Stack):
        self.partitioner, self.dropout = stack.partitioner, config.dropout
        norm = partial(_norm, config, stack)
        # Both outputs of every layer add to the stream: GPT-2 scales them so that its variance stays near one.
        out_scale = (2 * config.depth) ** -0.5
        self.attention_norm = norm()
        self.attention = _attention(config, out_scale, stack)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        shared = {"kind": config.mlp, "out_scale": out_scale, "stack": stack}
        self.mlp = (
            MLP(config.width, config.mlp_dim, bias=config.mlp_bias, **shared)
            if config.experts is None
            else MoE(config.width, config.mlp_dim, config.experts, **shared)
        )
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self, x_BTD: jax.Array, spec: AttentionSpec, place: Place, bits_BT: jax.Array | None, cache: Any
    ) -> tuple[jax.Array, Any, LayerStats]:
        """One layer; `x_BTD` has block positions before and after, `bits_BT` decide what is dropped."""
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), spec, place, cache)
        y_BTD = y_BTD if self.attention_post_norm is None else self.attention_post_norm(y_BTD)
        x_BTD += dropout(y_BTD, bits_BT, 0, self.dropout)
        y_BTD = self.partitioner.gather_sequence(self.mlp_norm(x_BTD), "mlp")
        y_BTD, stats = self.mlp(y_BTD, drops=cache is None) if isinstance(self.mlp, MoE) else (self.mlp(y_BTD), {})
        y_BTD = y_BTD if self.mlp_post_norm is None else self.mlp_post_norm(y_BTD)
        x_BTD += dropout(y_BTD, bits_BT, 1, self.dropout)
        return self.partitioner.row_major(x_BTD), cache, stats


def _norm(config: TransformerConfig, stack: Stack) -> Norm:
    """A norm of the stream."""
    return Norm(config.width, kind=config.norm, eps=config.norm_eps, offset=config.norm_offset, stack=stack)


def _attention(config: TransformerConfig, out_scale: float, stack: Stack) -> Attention | LatentAttention:
    """The attention of this config, whose output is started so small."""
    shape = AttentionShape(
        width=config.width,
        heads=config.heads,
        kv_heads=config.groups,
        head_dim=config.head_width,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        norm_offset=config.norm_offset,
        out_scale=out_scale,
        kernel=config.attention,
        method=config.context_attention,
    )
    return Attention(shape, stack) if config.latent is None else LatentAttention(config.latent, shape, stack)


class Context(NamedTuple):
    """What every layer is told of the tokens.

    Attributes:
        positions: places in their documents.
        segments: see `Place`.
        start: see `Place`.
        words: see `ops.dropout`; None where nothing is dropped.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    start: jax.Array | None = None
    words: jax.Array | None = None


class Cache(NamedTuple):
    """What decoding remembers.

    Attributes:
        kv: keys and values, or latents, of every layer.
        length: tokens in it, an int32 scalar.
    """

    kv: KV | Latents
    length: jax.Array


class Transformer(LayeredModule):
    """A decoder: words in, hidden states out; `head` makes them logits (see `ops.cross_entropy`)."""

    def __init__(self, config: TransformerConfig, partitioner: Partitioner):
        self.config, self.partitioner = config, partitioner
        alone, dense = (Stack(partitioner=partitioner, layers=layers) for layers in (0, config.dense_layers))
        words, places, width, declare = config.vocab_size, config.learned_positions, config.width, alone.declare
        init = normal(width**-0.5)
        self.embedding = declare((words, width), ("vocab", "embed"), init, "embedding")
        self.positions = declare((places, width), (None, "embed"), normal(0.01), "embedding") if places else None
        self.prefix = Block(replace(config, experts=None), dense) if dense.layers else None
        self.blocks = Block(config, replace(alone, layers=config.layers))
        self.norm = _norm(config, alone)
        head = None if config.tied else declare((width, words), ("embed", "vocab"), init, "head", contract=1)
        self.unembedding = head

    def hidden(self, batch: Inputs) -> jax.Array:
        """Hidden states after the last norm of whole sequences (see `embed`): `[B, T, D]`, whole positions."""
        return self.final_norm(self.apply_layers(self.embed(batch), batch)[0])

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Hidden states after the last norm of tokens that follow a cache, and the cache with these tokens.

        Words are int32; every row, with the tokens of it in the cache, is one document.
        """
        positions_BT = cache.length + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        layer = self._any_layer(Context(positions_BT, start=cache.length), uniform=True, policy="none")

        def body(x, xs):
            block, kind, number, kv = xs
            x, kv, _ = layer(block, x, kind, number, kv)
            return x, kv

        x_BTD, dense = self._embed_tokens(tokens_BT, positions_BT), self.config.dense_layers
        of_blocks, parts = cache.kv, []
        if self.prefix is not None:
            first, of_blocks = (jax.tree.map(lambda a, i=i: jnp.split(a, [dense])[i], cache.kv) for i in (0, 1))
            x_BTD, kv = jax.lax.scan(body, x_BTD, (self.prefix, *self._dense(), first))
            parts.append(kv)
        x_BTD, kv = jax.lax.scan(body, x_BTD, (self.blocks, self._kinds(), self._numbers(), of_blocks))
        kv = jax.tree.map(lambda *a: jnp.concatenate(a) if dense else a[0], *parts, kv)
        return self.final_norm(x_BTD), Cache(kv, cache.length + tokens_BT.shape[1])

    @override
    def embed(self, batch: Inputs, /) -> jax.Array:
        """The stream before the first layer of the stack (dense ones before it are done): `[B, T, D]`, block positions.

        Args:
            batch: `inputs` `[B, T]`, words, int32, in shard order; `positions` `[B, T]`, places in their
                documents, or none for those in the row; `segments` `[B, T]`, document ids: a token sees its own
                document alone, or none where every row is one document; `dropout` `[B, T]` (see `ops.dropout`), or
                none to drop nothing.
        """
        x_BTD = self._embed_tokens(batch["inputs"], self._positions(batch))
        x_BTD = dropout(x_BTD, layer_bits(batch.get(DROPOUT_FIELD), EMBEDDING_LAYER), 0, self.config.dropout)
        if self.prefix is None:
            return x_BTD
        return self._through(x_BTD, batch, (self.prefix, *self._dense()), uniform=True)[0]

    def apply_layers(
        self, x_BTD: jax.Array, batch: Inputs, staged: StageLayers | None = None
    ) -> tuple[jax.Array, LayerStats]:
        """The stream after the layers that `blocks` holds, block positions, and what they count, one row a layer.

        `batch` is as in `embed`; `staged` says of a pipeline which layers they are, None is all of them in order.
        """
        layers = (self.blocks, self._kinds(staged), self._numbers(staged))
        return self._through(x_BTD, batch, layers, uniform=staged is None or staged.uniform)

    def _through(
        self, x_BTD: jax.Array, batch: Inputs, layers: tuple[Block, jax.Array, jax.Array], *, uniform: bool
    ) -> tuple[jax.Array, LayerStats]:
        """The stream after blocks of these kinds and numbers, and what they count."""
        context = Context(self._positions(batch), batch.get("segments"), words=batch.get(DROPOUT_FIELD))

        def step(policy: Remat) -> Step:
            layer = self._any_layer(context, uniform=uniform, policy=policy)

            def through(x: jax.Array, xs: Any) -> tuple[jax.Array, LayerStats]:
                block, kind, number = xs
                x, _, stats = layer(block, x, kind, number, None)
                return x, stats

            return through

        return scan_pattern([step(policy) for policy in self.config.remats], x_BTD, layers)

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        """The stream after the last norm, whole positions."""
        return self.partitioner.gather_sequence(self.norm(x_BTD), "vocab")

    @override
    def output(self, x_BTD: jax.Array, /) -> FactoredLogits:
        return FactoredLogits(hidden=self.final_norm(x_BTD), head=self.head(), softcap=self.config.logit_softcap)

    @override
    def uniform(self, numbers: np.ndarray) -> bool:
        config = self.config
        kinds = [config.sight(config.dense_layers + number) if number >= 0 else None for number in numbers.flat]
        side_by_side = np.array(kinds, object).reshape(numbers.shape).transpose(1, 0, 2).reshape(numbers.shape[1], -1)
        return bool((side_by_side == side_by_side[:, :1]).all())

    @override
    def flops(self, data: Sequences) -> float:
        return data.seq_len * flops.flops_per_token(self.config, data.seq_len)

    @override
    def context_costs(self, data: Sequences) -> Mapping[str, ContextChoice]:
        config, partitioner = self.config, self.partitioner
        sharding = partitioner.sequence_sharding
        if sharding.num_shards == 1:
            return {}
        sizes = AttentionSizes(
            batch=1,
            seq_len=data.seq_len,
            num_heads=config.heads // partitioner.num_shards("heads"),
            num_kv_heads=config.groups // partitioner.num_shards("kv_heads"),
            head_dim=config.head_width,
            value_dim=config.value_width,
            itemsize=partitioner.compute_dtype.itemsize,
        )
        asked = config.context_attention
        return {
            sight: ContextChoice(
                choose_method(sharding, spec, sizes) if asked == "auto" else asked, context_costs(sharding, spec, sizes)
            )
            for sight, spec in ((sight, config.attention_spec(sight)) for sight in config.kinds)
        }

    @override
    def aux_loss(self, stats: LayerStats) -> jax.Array | None:
        """What the layers add to the loss, summed over tokens like it; None for nothing."""
        return moe.aux_loss(stats, (*self.partitioner.mesh_axes("batch"), *self.partitioner.mesh_axes("sequence")))

    @override
    def metrics(self, stats: LayerStats, weight: jax.Array) -> dict[str, jax.Array]:
        return moe.metrics(stats, weight)

    @override
    def update_buffers(self, stats: LayerStats) -> dict[str, Any]:
        experts, mlp = self.config.experts, self.blocks.mlp
        if experts is None or not isinstance(mlp, MoE) or mlp.bias is None:
            return {}
        return {"blocks": {"mlp": {"bias": moe.updated_bias(mlp.bias[...], stats, experts.bias_rate)}}}

    def _positions(self, batch: Inputs) -> jax.Array:
        if "positions" in batch:
            return batch["positions"]
        places_1T = self.partitioner.sequence_sharding.positions(batch["inputs"].shape[1])[None]
        return jax.reshard(places_1T, self.partitioner.spec(None, "sequence"))

    def _kinds(self, staged: StageLayers | None = None) -> jax.Array:
        """By layer the index of its sight among all: `[L]`, or `[L, S]` if stages differ; -1 for no layer."""
        config = self.config
        if staged is None:
            return self._kinds_of(range(config.dense_layers, config.depth))
        kinds = jnp.where(staged.numbers < 0, -1, self._kinds().at[staged.numbers].get(out_sharding=P(None, "stage")))
        return jax.reshard(kinds, P())[:, 0] if staged.uniform else kinds

    def _kinds_of(self, numbers: range) -> jax.Array:
        return jnp.array([self.config.kinds.index(self.config.sight(number)) for number in numbers])

    def _numbers(self, staged: StageLayers | None = None) -> jax.Array:
        """The numbers of the layers in the stack: `[L]`, or `[L, S]` in stages."""
        return jnp.arange(self.config.layers) if staged is None else staged.numbers

    def _dense(self) -> tuple[jax.Array, jax.Array]:
        """Kinds and numbers of the layers before the stack, whose numbers end before 0."""
        dense = self.config.dense_layers
        return self._kinds_of(range(dense)), jnp.arange(-dense, 0)

    def _any_layer(self, context: Context, uniform: bool, policy: Remat) -> Layer:
        """A layer of any kind as a function of its parameters, the stream, its kind, number and part of the cache."""
        branches = [self._layer(sight, context, policy) for sight in self.config.kinds]
        if not uniform:
            return lambda block, x, kind, number, kv: self._side_by_side(branches, block, x, kind, number)
        if len(branches) == 1:
            return lambda block, x, kind, number, kv: branches[0](block, x, number, kv)
        return lambda block, x, kind, number, kv: jax.lax.switch(kind, branches, block, x, number, kv)

    def _side_by_side(
        self, branches: Sequence[Layer], block: Block, x_BTD: jax.Array, kind_S: jax.Array, number_S: jax.Array
    ) -> tuple[jax.Array, None, LayerStats]:
        """Layers of several kinds, or none, in the stages of a pipeline: all rows pass all kinds and keep their own."""
        passed = [branch(block, x_BTD, number_S, None) for branch in branches]
        found = [(through_BTD, stats) for through_BTD, _, stats in passed]
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, found)

        def own(found: list[tuple[jax.Array, LayerStats]], x: jax.Array, kind_of_stage: jax.Array):
            # A selection takes its type from its last part: only one from zero keeps a partial sum what it is.
            parts = []
            for kind, (through, stats) in enumerate(found):
                other = kind_of_stage[0] != kind
                x = jnp.where(other, x, through)
                parts.append(jax.tree.map(lambda a, other=other: jnp.where(other, 0, a), stats))
            return x, jax.tree.map(lambda *a: sum(a[1:], start=a[0]), *parts)

        pick = jax.shard_map(own, in_specs=(specs, specs[0][0], P("stage")), out_specs=specs[0])
        y_BTD, stats = pick(found, x_BTD, kind_S)
        return y_BTD, None, stats

    def _layer(self, sight: Sight, context: Context, policy: Remat) -> Layer:
        """A layer of this sight as a function of its parameters, the stream, its number and its part of the cache."""
        config = self.config
        rope, dtype = config.rope_of(sight), self.partitioner.compute_dtype
        tables = None if rope is None else rope_tables(rope, context.positions, config.rotary_width, dtype)
        place = Place(tables, context.segments, context.start)

        def layer(block: Block, x: jax.Array, number: jax.Array, kv: Any) -> tuple[jax.Array, Any, LayerStats]:
            words = layer_bits(context.words, number + config.dense_layers)
            return block(x, config.attention_spec(sight), place, words, kv)

        return remat(layer, policy, alone=len(config.remats) == 1)

    def _embed_tokens(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rows of the embedding for words (and positions), with block positions."""
        partitioner = self.partitioner
        x_BTD = self._rows(tokens_BT)
        if self.positions is not None:
            table = partitioner.gather_weight(self.positions[...], (None, "embed"))
            places = jax.reshard(jnp.broadcast_to(positions_BT, tokens_BT.shape), partitioner.spec("batch", "sequence"))
            x_BTD += table.at[places].get(out_sharding=partitioner.spec("batch", "sequence", None))
        if self.config.scale_embeddings:
            x_BTD *= jnp.asarray(self.config.width**0.5, x_BTD.dtype)
        return partitioner.shard(x_BTD, "batch", "positions", None)

    def _rows(self, tokens_BT: jax.Array) -> jax.Array:
        """Embedding rows; where the vocabulary is sharded, every shard gives its own words and zero for others."""
        partitioner = self.partitioner
        out = partitioner.spec("batch", "sequence", None)
        axes = partitioner.mesh_axes("vocab")
        if not axes:
            # Devices look up their own part of every row, and exchange: rows are fewer bytes than the whole table.
            table_VD, apart = partitioner.lookup_table(self.embedding[...], "embed")
            tokens_BT = jax.reshard(tokens_BT, P(*apart.partitions[:2]))
            x_BTD = table_VD.at[tokens_BT].get(out_sharding=apart)
            return partitioner.reshard_to_tokens(x_BTD, "embed")
        table_VD = partitioner.gather_weight(self.embedding[...], ("vocab", "embed"))

        def local(table, tokens):
            tokens = tokens - jax.lax.axis_index(axes) * table.shape[0]
            mine = (tokens >= 0) & (tokens < table.shape[0])
            rows = table[jnp.where(mine, tokens, 0)]
            return jax.lax.psum(jnp.where(mine[..., None], rows, 0), axes)

        table_spec, token_spec = (jax.typeof(a).sharding.spec for a in (table_VD, tokens_BT))
        return jax.shard_map(local, in_specs=(table_spec, token_spec), out_specs=out)(table_VD, tokens_BT)

    def head(self) -> jax.Array:
        """The weight `[D, V]` that turns hidden states into logits, ready for use."""
        if self.unembedding is None:
            return self.partitioner.gather_weight(self.embedding[...], ("vocab", "embed")).T
        return self.partitioner.gather_weight(self.unembedding[...], ("embed", "vocab"))

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens of `batch` rows."""
        kv = self.blocks.attention.empty_cache(self.config.depth, batch, length)
        return Cache(kv, jnp.zeros((), jnp.int32))
