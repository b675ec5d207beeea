"""The vision transformer (Dosovitskiy et al. 2021, "An image is worth 16x16 words"): patches of an image as a sequence.

An image is cut into square patches, each becomes a position of the stream by one matrix product, and every position
gets a learned embedding. The layers are those of an encoder: pre-norm, every position sees all. What stands for the
image is the stream at a class token, or its mean.

Positions are few and, with a class token, odd in number: between layers they are spread over the mesh only where
that divides them, elsewhere never.

Shape suffixes: B batch, N patches, T positions, P features of a patch, D width, C classes, L layers, S stages.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal, Protocol, override

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import Count, Decay, Positive
from jaxinfra.models.attention import Attention, AttentionShape, Place
from jaxinfra.models.layers import MLP, Norm, Stack
from jaxinfra.models.model import ModelConfig
from jaxinfra.models.module import Inputs, LayeredModule, LayerStats, StageLayers
from jaxinfra.models.remat import Remat, remat
from jaxinfra.ops.attention import AttentionSpec, Kernel
from jaxinfra.ops.dot import dot
from jaxinfra.ops.dropout import DROPOUT_FIELD, EMBEDDING_LAYER, dropout, layer_bits
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import constant, normal

ALL = AttentionSpec(causal=False)
NOWHERE = Place(tables=None, segments=None, start=None)
"""Positions are in the stream: attention needs none."""


class Images(Protocol):
    """What the model needs to know of the data."""

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        ...

    @property
    def channels(self) -> int:
        """Numbers of a pixel."""
        ...


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(ModelConfig):
    """The shape of an image classifier.

    Attributes:
        image_size: pixels of a side.
        patch: pixels of a side of a patch.
        channels: numbers of a pixel.
        classes: that an image may be of.
        layers: blocks.
        width: residual width.
        heads: attention heads.
        mlp_dim: hidden width of the MLP.
        pool: what stands for the image: the stream at a class token before the patches, or its mean over them.
        norm_eps: added to the variance.
        attention: forces an attention kernel; None chooses by platform and shape.
        dropout: part of the features that are zero, while training, of the embedded patches and of what attention and
            MLP add to the stream.
        remat: what is kept of each layer for the backward pass.
    """

    modality: ClassVar[str | None] = "image"
    image_size: Count
    patch: Count
    classes: Count
    layers: Count
    width: Count
    heads: Count
    mlp_dim: Count
    channels: Count = 3
    pool: Literal["class", "mean"] = "class"
    norm_eps: Positive = 1e-6
    attention: Annotated[Kernel | None, NOT_FINGERPRINTED] = None
    dropout: Decay = 0.0
    remat: Annotated[Remat, NOT_FINGERPRINTED] = "none"

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def length(self) -> int:
        """Positions of the stream."""
        return self.patches + (self.pool == "class")

    def problems(self) -> Iterable[Problem]:
        """Patches tile the image, and heads the width."""
        if self.image_size % self.patch:
            fix = f"use patch={max(n for n in range(1, self.patch) if self.image_size % n == 0)}"
            yield Problem(fields=("image_size", "patch"), message="patches must tile the image", fix=fix)
        if self.width % self.heads:
            fix = f"use width={-(-self.width // self.heads) * self.heads}"
            yield Problem(fields=("width", "heads"), message="heads must divide the width", fix=fix)

    @property
    @override
    def pipeline_layers(self) -> int:
        return self.layers

    @property
    @override
    def uses_dropout(self) -> bool:
        return self.dropout > 0

    @property
    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        return {"heads": (self.heads, "heads"), "mlp_dim": (self.mlp_dim, "mlp"), "width": (self.width, "embed")}

    def problems_with(self, data: Images) -> Iterable[Problem]:
        """The images are those that the model is made for."""
        for name in ("image_size", "channels"):
            if (found := getattr(data, name)) != getattr(self, name):
                fix = f"use model.{name}={found}"
                yield Problem(fields=(f"model.{name}",), message=f"the images have {found}", fix=fix)

    @override
    def positions(self, data: Images) -> int:
        return self.length

    @override
    def build(self, partitioner: Partitioner) -> "VisionTransformer":
        rules = replace(partitioner.rules, sequence=())
        if self.length % replace(partitioner, rules=rules).num_shards("positions"):
            rules = replace(rules, block_sequence=())
        return VisionTransformer(self, replace(partitioner, rules=rules))


class EncoderBlock(nnx.Module):
    """Attention and MLP, each read from a norm of the residual stream and added back to it."""

    def __init__(self, config: VisionTransformerConfig, stack: Stack):
        self.partitioner, self.dropout = stack.partitioner, config.dropout
        width, eps = config.width, config.norm_eps
        norm = partial(Norm, width, kind="layernorm", eps=eps, stack=stack)
        # Both outputs of every layer add to the stream, whose variance is to stay near one.
        out_scale = (2 * config.layers) ** -0.5
        shape = AttentionShape(
            width=width,
            heads=config.heads,
            kv_heads=config.heads,
            head_dim=width // config.heads,
            qkv_bias=True,
            out_bias=True,
            norm_eps=eps,
            out_scale=out_scale,
            kernel=config.attention,
        )
        self.attention_norm = norm()
        self.attention = Attention(shape, stack)
        self.mlp_norm = norm()
        self.mlp = MLP(width, config.mlp_dim, kind="gelu", bias=True, out_scale=out_scale, stack=stack)

    def __call__(self, x_BTD: jax.Array, bits_BT: jax.Array | None) -> jax.Array:
        """One layer; `x_BTD` has block positions before and after, `bits_BT` decide what is dropped."""
        y_BTD, _ = self.attention(self.attention_norm(x_BTD), ALL, NOWHERE, None)
        x_BTD += dropout(y_BTD, bits_BT, 0, self.dropout)
        y_BTD = self.mlp(self.partitioner.gather_sequence(self.mlp_norm(x_BTD), "mlp"))
        return x_BTD + dropout(y_BTD, bits_BT, 1, self.dropout)


class VisionTransformer(LayeredModule):
    """Images in, logits of their classes out."""

    def __init__(self, config: VisionTransformerConfig, partitioner: Partitioner):
        self.config, self.partitioner = config, partitioner
        alone, width = Stack(partitioner=partitioner), config.width
        features = config.patch**2 * config.channels
        self.patches = alone.declare(
            (features, width), (None, "embed"), normal(features**-0.5), "embedding", contract=1
        )
        self.patches_bias = alone.declare((width,), (None,), constant(0.0), "bias")
        self.token = alone.declare((width,), (None,), normal(0.02), "embedding") if config.pool == "class" else None
        self.positions = alone.declare((config.length, width), (None, "embed"), normal(0.02), "embedding")
        self.blocks = EncoderBlock(config, replace(alone, layers=config.layers))
        self.norm = Norm(width, kind="layernorm", eps=config.norm_eps, stack=alone)
        self.classes = alone.declare((width, config.classes), ("embed", None), normal(width**-0.5), "head", contract=1)
        self.classes_bias = alone.declare((config.classes,), (None,), constant(0.0), "bias")

    @override
    def embed(self, batch: Inputs, /) -> jax.Array:
        """The stream before the first layer, `[B, T, D]` in the compute dtype, block positions.

        The batch has `images` `[B, H, W, channels]`, float32, and `dropout` `[B, T]` (see `ops.dropout`), or none.
        """
        partitioner = self.partitioner
        patches_BNP = to_patches(batch["images"], self.config.patch).astype(partitioner.compute_dtype)
        x_BND = dot(patches_BNP, partitioner.gather_weight(self.patches[...], (None, "embed")))
        table = partitioner.gather_weight(self.positions[...], (None, "embed"))
        bias = partitioner.gather_weight(self.patches_bias[...], (None,))
        if self.token is None:
            x_BTD = partitioner.map_local(lambda x, bias, table: x + bias + table, x_BND, bias, table)
        else:
            token = partitioner.gather_weight(self.token[...], (None,))
            x_BTD = partitioner.map_local(_with_token, x_BND, bias, table, token)
        x_BTD = partitioner.shard(x_BTD, "batch", "positions", None)
        return dropout(x_BTD, layer_bits(batch.get(DROPOUT_FIELD), EMBEDDING_LAYER), 0, self.config.dropout)

    @override
    def apply_layers(
        self, x_BTD: jax.Array, batch: Inputs, staged: StageLayers | None = None, /
    ) -> tuple[jax.Array, LayerStats]:
        """The stream after the layers that `blocks` holds, block positions; they count nothing (see `Model`)."""

        def layer(block: EncoderBlock, x_BTD: jax.Array, number: jax.Array) -> jax.Array:
            return block(x_BTD, layer_bits(batch.get(DROPOUT_FIELD), number))

        kept = remat(layer, self.config.remat)

        def body(x_BTD: jax.Array, layer: tuple[EncoderBlock, jax.Array]) -> tuple[jax.Array, None]:
            block, number = layer
            y_BTD = kept(block, x_BTD, number)
            return y_BTD if staged is None or staged.uniform else _where_held(number, y_BTD, x_BTD), None

        numbers = jnp.arange(self.config.layers) if staged is None else staged.numbers
        return jax.lax.scan(body, x_BTD, (self.blocks, numbers))[0], {}

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        """What stands for each image after the last norm: `[B, D]`."""
        x_BTD = self.partitioner.shard(x_BTD, "batch", "sequence", None)
        if self.token is not None:
            x_BTD = x_BTD[:, :1]
        return jnp.mean(self.norm(x_BTD, ("batch", "sequence")), axis=1)

    @override
    def output(self, x_BTD: jax.Array, /) -> jax.Array:
        """Returns the logits of the classes, float32 `[B, C]`."""
        partitioner = self.partitioner
        y_BC = dot(self.final_norm(x_BTD), partitioner.gather_weight(self.classes[...], ("embed", None)))
        return partitioner.map_local(jnp.add, y_BC, partitioner.gather_weight(self.classes_bias[...], (None,))).astype(
            jnp.float32
        )

    @override
    def uniform(self, numbers: np.ndarray) -> bool:
        held = numbers >= 0
        return bool((held.all(axis=-1) | ~held.any(axis=-1)).all())

    @override
    def flops(self, data: Images) -> float:
        """Returns `6` FLOPs a weight and position that it meets, and of attention `12` a pair and feature.

        Norms, pooling and softmax count nothing (see `models.flops`).
        """
        config = self.config
        width, length = config.width, config.length
        weights = 4 * width * width + 2 * width * config.mlp_dim
        ends = config.patches * config.patch**2 * config.channels * width + width * config.classes
        return 6 * (config.layers * length * weights + ends) + 12 * config.layers * width * length * length


def to_patches(images: jax.Array, patch: int) -> jax.Array:
    """`[B, H, W, channels]` to `[B, N, P]`: patches row by row, pixels row by row in each."""
    B, H, W, channels = images.shape
    rows, columns, spread = H // patch, W // patch, P(jax.typeof(images).sharding.spec.partitions[0])
    cut = images.reshape(B, rows, patch, columns, patch, channels, out_sharding=spread)
    joined = (B, rows * columns, patch * patch * channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(joined, out_sharding=spread)


def _with_token(x_BND: jax.Array, bias_D: jax.Array, table_TD: jax.Array, token_D: jax.Array) -> jax.Array:
    """The class token before the patches, with what each position has of its own."""
    token_B1D = jnp.broadcast_to(token_D, (x_BND.shape[0], 1, token_D.shape[0]))
    return jnp.concatenate([token_B1D, x_BND + bias_D], axis=1) + table_TD


def _where_held(number_S: jax.Array, y_BTD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """`y_BTD` in the rows of stages that hold a layer (of a number from 0), `x_BTD` in all others."""
    spec = jax.typeof(x_BTD).sharding.spec
    own = jax.shard_map(
        lambda number, y, x: jnp.where(number[0] >= 0, y, x), in_specs=(P("stage"), spec, spec), out_specs=spec
    )
    return own(number_S, y_BTD, x_BTD)
