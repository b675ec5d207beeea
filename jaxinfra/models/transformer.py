"""One decoder-only transformer that covers the published dense families by configuration.

Layers are stacked and scanned: few arrays, short compiles. Layers of different sight (sliding window or whole
length) have the same parameters and differ by a branch inside the scan.

Shape suffixes: B batch, T length, L layers, D residual width, V vocabulary, S cache length.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfra.config import Problem
from jaxinfra.models import flops, moe
from jaxinfra.models.attention import KV, Attention, AttentionShape, Place
from jaxinfra.models.latent import Latent, LatentAttention, Latents
from jaxinfra.models.layers import MLP, Norm, Stack
from jaxinfra.models.model import Inputs, LayerSums, Staged
from jaxinfra.models.moe import Experts, MoE
from jaxinfra.models.remat import Remat, remat
from jaxinfra.models.stack import Step, scan_pattern
from jaxinfra.ops.attention import Kernel, See
from jaxinfra.ops.dropout import BEFORE_LAYERS, FIELD, drop, layer_words
from jaxinfra.ops.rope import Rope, rope_tables
from jaxinfra.ops.route import Across, Form, Heads, cheaper, costs
from jaxinfra.parallel.layout import Layout
from jaxinfra.parallel.spec import normal

type Sight = Literal["global", "local"]
type Layer = Callable[..., tuple[jax.Array, Any, LayerSums]]
"""`(block, stream, kind, number, cache) -> (stream, cache, sums)`; without the kind if it is of one."""


class Sequences(Protocol):
    """What the model needs to know of the data."""

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        ...


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a decoder.

    Attributes:
        vocab_size: words.
        layers: blocks.
        width: residual width.
        heads: query heads.
        kv_heads: key/value heads; None is as many as `heads`.
        head_dim: width of a head; None is `width / heads`.
        latent: keys and values come from a small latent (DeepSeek); kv_heads and head_dim are then none.
        mlp_dim: hidden width of the MLP.
        mlp: its kind.
        experts: a mixture of experts in place of every MLP, of its kind; None for none.
        dense_layers: blocks with an MLP that come before those with experts, which `layers` counts (DeepSeek). In a
            pipeline every stage computes them for its own rows, though the first alone needs them.
        norm: kind of the norms.
        norm_eps: added to the variance.
        norm_offset: 1.0 where norm weights are stored as a difference from one (Gemma).
        post_norms: norms after attention and MLP as well as before (Gemma 2).
        qkv_bias: biases on queries, keys and values.
        out_bias: a bias on the output of attention.
        mlp_bias: biases in the MLP.
        qk_norm: RMSNorm on every query and key head (Qwen3, Gemma 3).
        sights: what the layers see, repeated over them: "global", or "local" within `window`.
        window: positions that a local layer sees, itself included.
        softcap: cap on attention scores.
        query_scale: factor on queries; None is `head_dim ** -0.5`.
        rope: rotary positions; None for none.
        local_rope: those of local layers; None is `rope`.
        learned_positions: rows of a learned position embedding; None for none (GPT-2).
        tied: the head is the embedding, transposed.
        scale_embeddings: embeddings times `sqrt(width)` (Gemma).
        logit_softcap: cap on the logits.
        attention: forces an attention kernel; None chooses by platform and shape.
        context_attention: how attention reaches the other shards of a sequence, where mesh.context is above 1: keys and
            values go round a "ring", or every shard will "gather" them; "auto" takes the cheaper.
        dropout: part of the features that are zero, while training, of the embedded words and of what attention and
            MLP add to the stream (Vaswani et al. 2017, section 5.4).
        remat: what is kept of each layer for the backward pass; a tuple is repeated over the layers, in a pipeline
            over those of each chunk.
    """

    unit: ClassVar[str] = "token"
    vocab_size: int
    layers: int
    width: int
    heads: int
    mlp_dim: int
    kv_heads: int | None = None
    head_dim: int | None = None
    latent: Latent | None = None
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    experts: Experts | None = None
    dense_layers: int = 0
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sights: tuple[Sight, ...] = ("global",)
    window: int | None = None
    softcap: float | None = None
    query_scale: float | None = None
    rope: Rope | None = Rope()
    local_rope: Rope | None = None
    learned_positions: int | None = None
    tied: bool = False
    scale_embeddings: bool = False
    logit_softcap: float | None = None
    attention: Kernel | None = None
    context_attention: Form | Literal["auto"] = "auto"
    dropout: float = 0.0
    remat: Remat | tuple[Remat, ...] = "none"

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        """Width of one query or key head."""
        if self.latent is not None:
            return self.latent.head_dim
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of one value head."""
        return self.head_width if self.latent is None else self.latent.value_dim

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head that rotary positions may rotate."""
        return self.head_width if self.latent is None else self.latent.rope_dim

    def problems(self) -> Iterable[Problem]:
        """Sizes are positive and divide; every option has what it needs."""
        for name in ("vocab_size", "layers", "width", "heads", "mlp_dim", "kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(fields=(name,), message="must be at least 1", fix=f"use {name}=1 or more")
        if self.latent is not None:
            yield from self._problems_of_latent()
        elif self.head_dim is None and self.heads > 0 and self.width % self.heads:
            fitting = -(-self.width // (2 * self.heads)) * 2 * self.heads  # rotary positions pair features
            yield Problem(
                fields=("width", "heads"),
                message="heads must divide the width",
                fix=f"use width={fitting} or set head_dim",
            )
        if self.groups > 0 and self.heads % self.groups:
            fitting = max(g for g in range(1, self.groups + 1) if self.heads % g == 0)
            yield Problem(
                fields=("heads", "kv_heads"), message="kv_heads must divide heads", fix=f"use kv_heads={fitting}"
            )
        if self.dense_layers < 0:
            yield Problem(fields=("dense_layers",), message="must not be negative", fix="use dense_layers=0")
        if self.dense_layers and self.experts is None:
            yield Problem(
                fields=("dense_layers", "experts"),
                message="without experts all layers are dense",
                fix=f"use dense_layers=0 layers={self.layers + self.dense_layers}",
            )
        if not 0 <= self.dropout < 1:
            yield Problem(fields=("dropout",), message="must be at least 0 and below 1", fix="use dropout=0.1")
        if not self.sights:
            yield Problem(fields=("sights",), message="names no layer", fix='use sights=("global",)')
        if "local" in self.sights and self.window is None:
            yield Problem(fields=("sights", "window"), message="local layers need a window", fix="use window=4096")
        if not 0 < len(self.remats) <= max(self.layers, 1):
            yield Problem(
                fields=("remat", "layers"),
                message=f"{len(self.remats)} policies for {self.layers} layers",
                fix="use remat=full",
            )
        for name in ("rope", "local_rope"):
            rope = getattr(self, name)
            if rope is not None and int(self.rotary_width * rope.fraction) % 2:
                width = "head_dim" if self.latent is None else "latent.rope_dim"
                yield Problem(
                    fields=(f"{name}.fraction", width),
                    message="the rotated part of a head must be even",
                    fix=f"use {name}.fraction=1.0"
                    if self.rotary_width % 2 == 0
                    else f"use {width}={self.rotary_width + 1}",
                )

    def _problems_of_latent(self) -> Iterable[Problem]:
        """What latent attention has instead is not given as well."""
        for name in ("kv_heads", "head_dim", "qkv_bias", "out_bias", "qk_norm"):
            value = getattr(self, name)
            if value is not None and value is not False:
                without = "none" if value is not True else "false"
                yield Problem(fields=(name, "latent"), message="latent attention has none", fix=f"use {name}={without}")
        if self.rope is None:
            yield Problem(fields=("rope", "latent"), message="latent attention rotates keys", fix="use rope=rope")

    @property
    def spread(self) -> Mapping[str, tuple[int, str]]:
        """See `ModelConfig`."""
        latent = self.latent
        ranks = () if latent is None else (("kv_rank", latent.kv_rank), ("q_rank", latent.q_rank))
        found = {
            **{f"latent.{name}": (rank, "embed") for name, rank in ranks if rank is not None},
            "heads": (self.heads, "heads"),
            "kv_heads": (self.groups, "kv_heads"),
            "mlp_dim": (self.mlp_dim, "mlp"),
            "vocab_size": (self.vocab_size, "vocab"),
            "width": (self.width, "embed"),
        }
        if self.experts is not None:
            found["experts.count"] = (self.experts.count, "experts")
            if self.experts.dim is not None:
                found["experts.dim"] = (self.experts.dim, "mlp")
        return found

    def problems_with(self, data: Sequences) -> Iterable[Problem]:
        """Learned positions are as many as a sequence has."""
        longest = self.learned_positions
        if longest is not None and data.seq_len > longest:
            yield Problem(
                fields=("data.seq_len", "model.learned_positions"),
                message="sequences are longer than the learned positions",
                fix=f"use data.seq_len={longest}",
            )

    def positions(self, data: Sequences) -> int:
        """Tokens of a sequence."""
        return data.seq_len

    def flops(self, data: Sequences) -> float:
        """FLOPs of training on one sequence."""
        return data.seq_len * flops.flops_per_token(self, data.seq_len)

    def across(self, data: Sequences, layout: Layout) -> Mapping[str, Across]:
        """See `ModelConfig`; one sequence of one device."""
        order = layout.order
        if order.shards == 1:
            return {}
        heads = Heads(
            rows=1,
            length=data.seq_len,
            heads=self.heads // layout.shards("heads"),
            groups=self.groups // layout.shards("kv_heads"),
            head_dim=self.head_width,
            value_dim=self.value_width,
            itemsize=layout.compute_dtype.itemsize,
        )
        sees = {sight: self.see(sight) for sight in self.kinds}
        asked = self.context_attention
        return {
            sight: Across(cheaper(order, see, heads) if asked == "auto" else asked, costs(order, see, heads))
            for sight, see in sees.items()
        }

    def see(self, sight: Sight) -> See:
        """What a layer of this sight sees."""
        window, scale, rope = self.window if sight == "local" else None, self.query_scale, self.rope_of(sight)
        stretch = 1.0 if rope is None else rope.score_scale
        if self.latent is not None or stretch != 1:
            # Where latents are decoded, queries are wider than heads, and no width says what their scale is.
            scale = stretch * (self.head_width**-0.5 if scale is None else scale)
        return See(causal=True, window=window, softcap=self.softcap, scale=scale)

    def rope_of(self, sight: Sight) -> Rope | None:
        """The rotary positions of a layer of this sight."""
        return self.local_rope if sight == "local" and self.local_rope is not None else self.rope

    @property
    def depth(self) -> int:
        """Blocks of both kinds."""
        return self.dense_layers + self.layers

    def sight(self, number: int) -> Sight:
        """What the layer of this number, of all from the first dense one on, sees."""
        return self.sights[number % len(self.sights)]

    @property
    def remats(self) -> tuple[Remat, ...]:
        """The remat policies of the layers, repeated over them."""
        return self.remat if isinstance(self.remat, tuple) else (self.remat,)

    @property
    def kinds(self) -> tuple[Sight, ...]:
        """The different sights of the layers, in order."""
        return tuple(dict.fromkeys(self.sight(number) for number in range(self.depth)))

    def alike(self, numbers: np.ndarray) -> bool:
        """Whether the layers that stand side by side in pipeline stages all are of one kind.

        Args:
            numbers: `[chunks, layers of a chunk, stages]`; -1 for none.
        """
        kinds = [self.sight(self.dense_layers + number) if number >= 0 else None for number in numbers.flat]
        side_by_side = np.array(kinds, object).reshape(numbers.shape).transpose(1, 0, 2).reshape(numbers.shape[1], -1)
        return bool((side_by_side == side_by_side[:, :1]).all())

    def build(self, layout: Layout) -> "Transformer":
        """The module, with `ParamSpec`s where arrays will be."""
        return Transformer(self, layout)


class Block(nnx.Module):
    """Attention and MLP, each read from a norm of the residual stream and added back to it."""

    def __init__(self, config: TransformerConfig, layout: Layout, stack: Stack):
        self.layout, self.dropout = layout, config.dropout
        norm = partial(
            Norm,
            config.width,
            kind=config.norm,
            eps=config.norm_eps,
            offset=config.norm_offset,
            stack=stack,
            layout=layout,
        )
        # Both outputs of every layer add to the stream: GPT-2 scales them so that its variance stays near one.
        out_scale = (2 * config.depth) ** -0.5
        self.attention_norm = norm()
        self.attention = _attention(config, out_scale, stack, layout)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        shared = {"kind": config.mlp, "out_scale": out_scale, "stack": stack, "layout": layout}
        self.mlp = (
            MLP(config.width, config.mlp_dim, bias=config.mlp_bias, **shared)
            if config.experts is None
            else MoE(config.width, config.mlp_dim, config.experts, **shared)
        )
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self, x_BTD: jax.Array, see: See, place: Place, words_BT: jax.Array | None, cache: Any
    ) -> tuple[jax.Array, Any, LayerSums]:
        """One layer; `x_BTD` has block positions before and after, `words_BT` decide what is dropped."""
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), see, place, cache)
        y_BTD = y_BTD if self.attention_post_norm is None else self.attention_post_norm(y_BTD)
        x_BTD += self._drop(y_BTD, words_BT, site=0)
        y_BTD, sums = self._inner(self.layout.whole(self.mlp_norm(x_BTD)), drops=cache is None)
        y_BTD = y_BTD if self.mlp_post_norm is None else self.mlp_post_norm(y_BTD)
        x_BTD += self._drop(y_BTD, words_BT, site=1)
        return self.layout.rows(x_BTD), cache, sums

    def _inner(self, x_BTD: jax.Array, *, drops: bool) -> tuple[jax.Array, LayerSums]:
        """What the MLP or the experts make of the stream, and what they count."""
        return self.mlp(x_BTD, drops=drops) if isinstance(self.mlp, MoE) else (self.mlp(x_BTD), {})

    def _drop(self, y_BTD: jax.Array, words_BT: jax.Array | None, site: int) -> jax.Array:
        return y_BTD if words_BT is None else drop(y_BTD, words_BT, site, self.dropout)


def _attention(
    config: TransformerConfig, out_scale: float, stack: Stack, layout: Layout
) -> Attention | LatentAttention:
    """The attention of this config, whose output is started so small."""
    if config.latent is not None:
        return LatentAttention(
            config.latent,
            width=config.width,
            heads=config.heads,
            norm_eps=config.norm_eps,
            norm_offset=config.norm_offset,
            out_scale=out_scale,
            kernel=config.attention,
            form=config.context_attention,
            stack=stack,
            layout=layout,
        )
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
        form=config.context_attention,
    )
    return Attention(shape, stack=stack, layout=layout)


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


class Transformer(nnx.Module):
    """A decoder: words in, hidden states out; `head` makes them logits (see `ops.cross_entropy`)."""

    def __init__(self, config: TransformerConfig, layout: Layout):
        self.config, self.layout = config, layout
        alone = Stack()
        embed = normal(config.width**-0.5)
        self.embedding = alone.declare((config.vocab_size, config.width), ("vocab", "embed"), embed, "embedding")
        self.positions = (
            alone.declare((config.learned_positions, config.width), (None, "embed"), normal(0.01), "embedding")
            if config.learned_positions
            else None
        )
        dense = replace(config, experts=None)
        self.prefix = Block(dense, layout, Stack(layers=config.dense_layers)) if config.dense_layers else None
        self.blocks = Block(config, layout, Stack(layers=config.layers))
        self.norm = Norm(
            config.width,
            kind=config.norm,
            eps=config.norm_eps,
            offset=config.norm_offset,
            stack=alone,
            layout=layout,
        )
        self.unembedding = (
            None
            if config.tied
            else alone.declare(
                (config.width, config.vocab_size), ("embed", "vocab"), normal(config.width**-0.5), "head", contract=1
            )
        )

    def hidden(self, batch: Inputs) -> jax.Array:
        """Hidden states after the last norm of whole sequences (see `begin`): `[B, T, D]`, whole positions."""
        return self.end(self.layers(self.begin(batch), batch)[0])

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Hidden states after the last norm of tokens that follow a cache, and the cache with these tokens.

        Args:
            tokens_BT: words, int32.
            cache: of earlier tokens of the same rows, each one document.
        """
        positions_BT = cache.length + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        layer = self._any_layer(Context(positions_BT, start=cache.length), alike=True, policy="none")

        def body(x, xs):
            block, kind, number, kv = xs
            x, kv, _ = layer(block, x, kind, number, kv)
            return x, kv

        x_BTD, dense = self._embed(tokens_BT, positions_BT), self.config.dense_layers
        of_blocks, parts = cache.kv, []
        if self.prefix is not None:
            first, of_blocks = (jax.tree.map(lambda a, i=i: jnp.split(a, [dense])[i], cache.kv) for i in (0, 1))
            x_BTD, kv = jax.lax.scan(body, x_BTD, (self.prefix, *self._dense(), first))
            parts.append(kv)
        x_BTD, kv = jax.lax.scan(body, x_BTD, (self.blocks, self._kinds(), self._numbers(), of_blocks))
        kv = jax.tree.map(lambda *a: jnp.concatenate(a) if dense else a[0], *parts, kv)
        return self.end(x_BTD), Cache(kv, cache.length + tokens_BT.shape[1])

    def begin(self, batch: Inputs) -> jax.Array:
        """The stream before the first layer of the stack: dense ones before it are done.

        Args:
            batch: `inputs` `[B, T]`, words, int32, in the order of the layout; `positions` `[B, T]`, places in their
                documents, or none for those in the row; `segments` `[B, T]`, document ids: a token sees its own
                document alone, or none where every row is one document; `dropout` `[B, T]` (see `ops.dropout`), or
                none to drop nothing.

        Returns:
            `[B, T, D]` in the compute dtype, block positions.
        """
        x_BTD = self._embed(batch["inputs"], self._positions(batch))
        if FIELD in batch:
            x_BTD = drop(x_BTD, layer_words(batch[FIELD], BEFORE_LAYERS), 0, self.config.dropout)
        if self.prefix is None:
            return x_BTD
        return self._through(x_BTD, batch, (self.prefix, *self._dense()), alike=True)[0]

    def layers(self, x_BTD: jax.Array, batch: Inputs, staged: Staged | None = None) -> tuple[jax.Array, LayerSums]:
        """The stream after some layers: those that `blocks` holds.

        Args:
            x_BTD: the stream, block positions.
            batch: as in `begin`.
            staged: of a pipeline, which layers they are; None for all, one after the other.

        Returns:
            The stream, and what the layers count: each array has one row a layer.
        """
        layers = (self.blocks, self._kinds(staged), self._numbers(staged))
        return self._through(x_BTD, batch, layers, alike=staged is None or staged.alike)

    def _through(
        self, x_BTD: jax.Array, batch: Inputs, layers: tuple[Block, jax.Array, jax.Array], *, alike: bool
    ) -> tuple[jax.Array, LayerSums]:
        """The stream after blocks of these kinds and numbers, and what they count."""
        context = Context(self._positions(batch), batch.get("segments"), words=batch.get(FIELD))

        def step(policy: Remat) -> Step:
            layer = self._any_layer(context, alike=alike, policy=policy)

            def through(x: jax.Array, xs: Any) -> tuple[jax.Array, LayerSums]:
                block, kind, number = xs
                x, _, sums = layer(block, x, kind, number, None)
                return x, sums

            return through

        return scan_pattern([step(policy) for policy in self.config.remats], x_BTD, layers)

    def end(self, x_BTD: jax.Array) -> jax.Array:
        """The stream after the last norm, whole positions."""
        return self.layout.whole(self.norm(x_BTD))

    def penalty(self, sums: LayerSums) -> jax.Array | None:
        """What the layers add to the loss, summed over tokens like it; None for nothing."""
        return moe.penalty(sums, (*self.layout.mesh_axes("batch"), *self.layout.mesh_axes("sequence")))

    def measures(self, sums: LayerSums, weight: jax.Array) -> dict[str, jax.Array]:
        """See `Model`."""
        return moe.measures(sums, weight)

    def moved(self, sums: LayerSums) -> dict[str, Any]:
        """See `Model`: the biases of experts."""
        experts, mlp = self.config.experts, self.blocks.mlp
        if experts is None or not isinstance(mlp, MoE) or mlp.bias is None:
            return {}
        return {"blocks": {"mlp": {"bias": moe.moved(mlp.bias[...], sums, experts.bias_rate)}}}

    def _positions(self, batch: Inputs) -> jax.Array:
        found = batch.get("positions")
        if found is not None:
            return found
        places_1T = self.layout.order.places(batch["inputs"].shape[1])[None]
        return jax.reshard(places_1T, self.layout.spec(None, "sequence"))

    def _kinds(self, staged: Staged | None = None) -> jax.Array:
        """By layer the index of its sight among all: `[L]`, or `[L, S]` if stages differ; -1 for no layer."""
        config = self.config
        if staged is None:
            return self._kinds_of(range(config.dense_layers, config.depth))
        kinds = jnp.where(staged.numbers < 0, -1, self._kinds().at[staged.numbers].get(out_sharding=P(None, "stage")))
        return jax.reshard(kinds, P())[:, 0] if staged.alike else kinds

    def _kinds_of(self, numbers: range) -> jax.Array:
        return jnp.array([self.config.kinds.index(self.config.sight(number)) for number in numbers])

    def _numbers(self, staged: Staged | None = None) -> jax.Array:
        """The numbers of the layers in the stack: `[L]`, or `[L, S]` in stages."""
        return jnp.arange(self.config.layers) if staged is None else staged.numbers

    def _dense(self) -> tuple[jax.Array, jax.Array]:
        """Kinds and numbers of the layers before the stack, whose numbers end before 0."""
        dense = self.config.dense_layers
        return self._kinds_of(range(dense)), jnp.arange(-dense, 0)

    def _any_layer(self, context: Context, alike: bool, policy: Remat) -> Layer:
        """A layer of any kind as a function of its parameters, the stream, its kind, number and part of the cache."""
        branches = [self._layer(sight, context, policy) for sight in self.config.kinds]
        if not alike:
            return lambda block, x, kind, number, kv: self._side_by_side(branches, block, x, kind, number)
        if len(branches) == 1:
            return lambda block, x, kind, number, kv: branches[0](block, x, number, kv)
        return lambda block, x, kind, number, kv: jax.lax.switch(kind, branches, block, x, number, kv)

    def _side_by_side(
        self, branches: Sequence[Layer], block: Block, x_BTD: jax.Array, kind_S: jax.Array, number_S: jax.Array
    ) -> tuple[jax.Array, None, LayerSums]:
        """Layers of several kinds, or none, in the stages of a pipeline: all rows pass all kinds and keep their own."""
        passed = [branch(block, x_BTD, number_S, None) for branch in branches]
        found = [(through_BTD, sums) for through_BTD, _, sums in passed]
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, found)

        def own(found: list[tuple[jax.Array, LayerSums]], x: jax.Array, kind_of_stage: jax.Array):
            # A selection takes its type from its last part: only one from zero keeps a partial sum what it is.
            parts = []
            for kind, (through, sums) in enumerate(found):
                other = kind_of_stage[0] != kind
                x = jnp.where(other, x, through)
                parts.append(jax.tree.map(lambda a, other=other: jnp.where(other, 0, a), sums))
            return x, jax.tree.map(lambda *a: sum(a[1:], start=a[0]), *parts)

        pick = jax.shard_map(own, in_specs=(specs, specs[0][0], P("stage")), out_specs=specs[0])
        y_BTD, sums = pick(found, x_BTD, kind_S)
        return y_BTD, None, sums

    def _layer(self, sight: Sight, context: Context, policy: Remat) -> Layer:
        """A layer of this sight as a function of its parameters, the stream, its number and its part of the cache."""
        config = self.config
        rope, dtype = config.rope_of(sight), self.layout.compute_dtype
        tables = None if rope is None else rope_tables(rope, context.positions, config.rotary_width, dtype)
        place = Place(tables, context.segments, context.start)

        def layer(block: Block, x: jax.Array, number: jax.Array, kv: Any) -> tuple[jax.Array, Any, LayerSums]:
            words = None if context.words is None else layer_words(context.words, number + config.dense_layers)
            return block(x, config.see(sight), place, words, kv)

        return remat(layer, policy, alone=len(config.remats) == 1)

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Rows of the embedding for words (and positions), with block positions."""
        layout = self.layout
        x_BTD = self._rows(tokens_BT)
        if self.positions is not None:
            table = layout.weight(self.positions[...], (None, "embed"))
            places = jnp.broadcast_to(positions_BT, tokens_BT.shape)
            places = jax.reshard(places, layout.spec("batch", "sequence"))
            x_BTD += table.at[places].get(out_sharding=layout.spec("batch", "sequence", None))
        if self.config.scale_embeddings:
            x_BTD *= jnp.asarray(self.config.width**0.5, x_BTD.dtype)
        return layout.shard(x_BTD, "batch", "positions", None)

    def _rows(self, tokens_BT: jax.Array) -> jax.Array:
        """Embedding rows; where the vocabulary is sharded, every shard gives its own words and zero for others."""
        layout = self.layout
        out = layout.spec("batch", "sequence", None)
        axes = layout.mesh_axes("vocab")
        if not axes:
            # Devices look up their own part of every row, and exchange: rows are fewer bytes than the whole table.
            table_VD, apart = layout.columns(self.embedding[...], "embed")
            tokens_BT = jax.reshard(tokens_BT, P(*apart.partitions[:2]))
            x_BTD = table_VD.at[tokens_BT].get(out_sharding=apart)
            return layout.by_tokens(x_BTD, "embed")
        table_VD = layout.weight(self.embedding[...], ("vocab", "embed"))

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
            return self.layout.weight(self.embedding[...], ("vocab", "embed")).T
        return self.layout.weight(self.unembedding[...], ("embed", "vocab"))

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens of `batch` rows."""
        kv = self.blocks.attention.empty_cache(self.config.depth, batch, length)
        return Cache(kv, jnp.zeros((), jnp.int32))
