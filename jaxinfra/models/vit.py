"""The vision transformer (Dosovitskiy et al. 2021, "An image is worth 16x16 words") as an image classifier.

An image is cut into square patches. A matmul projects each patch to one position, and each position gets a learned
embedding. Layers are pre-norm and bidirectional. The head reads the class token, or the mean over positions.

Positions are few and, with a class token, odd in number. Attention never shards them, and the residual stream does so
only if the shards divide them.

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
from jaxinfra.config.limits import DecayRate, PositiveFloat, PositiveInt
from jaxinfra.models.attention import Attention, AttentionConfig, TokenInfo
from jaxinfra.models.layers import MLP, SEQUENCE, Norm, ParamFactory
from jaxinfra.models.model import ModelConfig
from jaxinfra.models.module import Inputs, LayeredModule, LayerStats, StageLayers
from jaxinfra.models.remat import Remat, remat
from jaxinfra.ops.attention import AttentionSpec, Kernel
from jaxinfra.ops.dot import dot
from jaxinfra.ops.dropout import DROPOUT_FIELD, EMBEDDING_LAYER, dropout, layer_bits
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import constant, normal

BIDIRECTIONAL = AttentionSpec(causal=False)


class HasImages(Protocol):
    """A data config with images."""

    @property
    def image_size(self) -> int:
        """Height and width of an image, in pixels."""
        ...

    @property
    def channels(self) -> int:
        """Color channels of an image."""
        ...


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(ModelConfig):
    """The shape of an image classifier.

    Attributes:
        image_size: height and width of an image, in pixels.
        patch_size: height and width of a patch, in pixels.
        num_classes: number of classes.
        num_layers: encoder layers.
        hidden_size: width of the residual stream.
        num_heads: attention heads.
        mlp_dim: hidden width of the MLP.
        channels: color channels of an image.
        pool: input of the head: a "class" token before the patches, or the "mean" over patches.
        norm_eps: added to the variance.
        attention_kernel: forces a kernel; None takes the fastest one that can run.
        dropout: dropout rate in training, on embeddings and on the outputs of attention and MLP.
        remat: what each layer saves for the backward pass (see `models.remat`).
    """

    modality: ClassVar[str | None] = "image"
    image_size: PositiveInt
    patch_size: PositiveInt
    num_classes: PositiveInt
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    mlp_dim: PositiveInt
    channels: PositiveInt = 3
    pool: Literal["class", "mean"] = "class"
    norm_eps: PositiveFloat = 1e-6
    attention_kernel: Annotated[Kernel | None, NOT_FINGERPRINTED] = None
    dropout: DecayRate = 0.0
    remat: Annotated[Remat, NOT_FINGERPRINTED] = "none"

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def length(self) -> int:
        """Number of positions: the patches, and the class token if there is one."""
        return self.num_patches + (self.pool == "class")

    def problems(self) -> Iterable[Problem]:
        """Yields sizes that are not divisible."""
        if self.image_size % self.patch_size:
            fix = f"use patch_size={max(n for n in range(1, self.patch_size) if self.image_size % n == 0)}"
            message = "patch_size must divide image_size"
            yield Problem(fields=("image_size", "patch_size"), message=message, fix=fix)
        if self.hidden_size % self.num_heads:
            fix = f"use hidden_size={-(-self.hidden_size // self.num_heads) * self.num_heads}"
            yield Problem(fields=("hidden_size", "num_heads"), message="num_heads must divide hidden_size", fix=fix)

    @property
    @override
    def pipeline_layers(self) -> int:
        return self.num_layers

    @property
    @override
    def uses_dropout(self) -> bool:
        return self.dropout > 0

    @property
    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        return {
            "num_heads": (self.num_heads, "heads"),
            "mlp_dim": (self.mlp_dim, "mlp"),
            "hidden_size": (self.hidden_size, "embed"),
        }

    @override
    def problems_with(self, data: HasImages) -> Iterable[Problem]:
        for name in ("image_size", "channels"):
            if (actual := getattr(data, name)) != getattr(self, name):
                fix = f"use model.{name}={actual}"
                yield Problem(fields=(f"model.{name}",), message=f"the images have {actual}", fix=fix)

    @override
    def positions(self, data: HasImages) -> int:
        return self.length

    @override
    def build(self, partitioner: Partitioner) -> "VisionTransformer":
        rules = replace(partitioner.rules, sequence=())
        if self.length % replace(partitioner, rules=rules).num_shards("positions"):
            rules = replace(rules, block_sequence=())
        return VisionTransformer(self, replace(partitioner, rules=rules))


class EncoderBlock(nnx.Module):
    """One layer: attention and MLP, each after a norm; their outputs are added to the residual stream."""

    def __init__(self, config: VisionTransformerConfig, params: ParamFactory):
        self.partitioner, self.dropout = params.partitioner, config.dropout
        hidden, heads, eps = config.hidden_size, config.num_heads, config.norm_eps
        norm = partial(Norm, hidden, norm_type="layernorm", eps=eps, params=params)
        # Each layer adds two outputs to the residual stream. This scale keeps its variance near one.
        out_scale = (2 * config.num_layers) ** -0.5
        attention = AttentionConfig(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            qkv_bias=True,
            out_bias=True,
            norm_eps=eps,
            out_scale=out_scale,
            kernel=config.attention_kernel,
        )
        self.attention_norm = norm()
        self.attention = Attention(attention, params)
        self.mlp_norm = norm()
        self.mlp = MLP(hidden, config.mlp_dim, mlp_type="gelu", bias=True, out_scale=out_scale, params=params)

    def __call__(self, x_BTD: jax.Array, bits_BT: jax.Array | None) -> jax.Array:
        """Returns the residual stream after the layer; `bits_BT` are its dropout bits."""
        y_BTD, _ = self.attention(self.attention_norm(x_BTD), BIDIRECTIONAL, TokenInfo(), None)
        x_BTD += dropout(y_BTD, bits_BT, 0, self.dropout)
        y_BTD = self.mlp(self.partitioner.gather_sequence(self.mlp_norm(x_BTD), "mlp"))
        return x_BTD + dropout(y_BTD, bits_BT, 1, self.dropout)


class VisionTransformer(LayeredModule):
    """A classifier from images to logits."""

    def __init__(self, config: VisionTransformerConfig, partitioner: Partitioner):
        self.config, self.partitioner = config, partitioner
        hidden, classes, features = config.hidden_size, config.num_classes, config.patch_size**2 * config.channels
        params = ParamFactory(partitioner=partitioner)
        param = params.param
        self.patches = param((features, hidden), (None, "embed"), normal(features**-0.5), "embedding", in_dims=1)
        self.patches_bias = param((hidden,), (None,), constant(0.0), "bias")
        self.token = param((hidden,), (None,), normal(0.02), "embedding") if config.pool == "class" else None
        self.positions = param((config.length, hidden), (None, "embed"), normal(0.02), "embedding")
        self.blocks = EncoderBlock(config, replace(params, num_layers=config.num_layers))
        self.norm = Norm(hidden, norm_type="layernorm", eps=config.norm_eps, params=params)
        self.classes = param((hidden, classes), ("embed", None), normal(hidden**-0.5), "head", in_dims=1)
        self.classes_bias = param((classes,), (None,), constant(0.0), "bias")

    @override
    def embed(self, batch: Inputs, /) -> jax.Array:
        """Embeds patches: `[B, T, D]` in the compute dtype.

        The batch has "images" `[B, H, W, channels]`, float32, and may have "dropout" `[B, T]` (see `ops.dropout`).
        """
        partitioner = self.partitioner
        patches_BNP = to_patches(batch["images"], self.config.patch_size).astype(partitioner.compute_dtype)
        x_BND = dot(patches_BNP, partitioner.gather_weight(self.patches[...], (None, "embed")))
        table = partitioner.gather_weight(self.positions[...], (None, "embed"))
        bias = partitioner.gather_weight(self.patches_bias[...], (None,))
        if self.token is None:
            x_BTD = partitioner.map_local(lambda x, bias, table: x + bias + table, x_BND, bias, table)
        else:
            token = partitioner.gather_weight(self.token[...], (None,))
            x_BTD = partitioner.map_local(_with_class_token, x_BND, bias, table, token)
        x_BTD = partitioner.shard(x_BTD, "batch", "positions", None)
        return dropout(x_BTD, layer_bits(batch.get(DROPOUT_FIELD), EMBEDDING_LAYER), 0, self.config.dropout)

    @override
    def apply_layers(
        self, x_BTD: jax.Array, batch: Inputs, stage_layers: StageLayers | None = None, /
    ) -> tuple[jax.Array, LayerStats]:
        def layer(block: EncoderBlock, x_BTD: jax.Array, index: jax.Array) -> jax.Array:
            return block(x_BTD, layer_bits(batch.get(DROPOUT_FIELD), index))

        remat_layer = remat(layer, self.config.remat)

        def body(x_BTD: jax.Array, xs: tuple[EncoderBlock, jax.Array]) -> tuple[jax.Array, None]:
            block, index = xs
            y_BTD = remat_layer(block, x_BTD, index)
            if stage_layers is not None and not stage_layers.uniform:
                y_BTD = _where_layer(index, y_BTD, x_BTD)
            return y_BTD, None

        indices = jnp.arange(self.config.num_layers) if stage_layers is None else stage_layers.indices
        return jax.lax.scan(body, x_BTD, (self.blocks, indices))[0], {}

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        """Applies the norm after the last layer and pools positions: `[B, D]`."""
        x_BTD = self.partitioner.shard(x_BTD, *SEQUENCE, None)
        if self.token is not None:
            x_BTD = x_BTD[:, :1]
        return jnp.mean(self.norm(x_BTD, SEQUENCE), axis=1)

    @override
    def output(self, x_BTD: jax.Array, /) -> jax.Array:
        """Returns the logits of the classes, float32 `[B, C]`."""
        gather = self.partitioner.gather_weight
        y_BC = dot(self.final_norm(x_BTD), gather(self.classes[...], ("embed", None)))
        bias_C = gather(self.classes_bias[...], (None,))
        return self.partitioner.map_local(jnp.add, y_BC, bias_C).astype(jnp.float32)

    @override
    def uniform(self, layers: np.ndarray) -> bool:
        has_layer = layers >= 0
        # All stages have a layer, or none has one.
        return bool((has_layer.all(axis=-1) | ~has_layer.any(axis=-1)).all())

    @override
    def flops(self, data: HasImages) -> float:
        """Counts 6 FLOPs per weight and position, and in attention 12 per feature and pair of positions.

        Norms, pooling and softmax are not counted (see `models.flops`).
        """
        config, hidden, length = self.config, self.config.hidden_size, self.config.length
        layer_weights = 4 * hidden * hidden + 2 * hidden * config.mlp_dim
        patches = config.num_patches * config.patch_size**2 * config.channels * hidden
        matmuls = config.num_layers * length * layer_weights + patches + hidden * config.num_classes
        return 6 * matmuls + 12 * config.num_layers * hidden * length * length


def to_patches(images: jax.Array, patch_size: int) -> jax.Array:
    """Reshapes `[B, H, W, channels]` to `[B, N, P]`: patches, and the pixels in them, in row-major order."""
    B, H, W, channels = images.shape
    rows, columns = H // patch_size, W // patch_size
    out = P(jax.typeof(images).sharding.spec.partitions[0])
    grid = images.reshape(B, rows, patch_size, columns, patch_size, channels, out_sharding=out)
    shape = (B, rows * columns, patch_size * patch_size * channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(shape, out_sharding=out)


def _with_class_token(x_BND: jax.Array, bias_D: jax.Array, table_TD: jax.Array, token_D: jax.Array) -> jax.Array:
    """Puts the class token before the patches, and adds the position embeddings."""
    token_B1D = jnp.broadcast_to(token_D, (x_BND.shape[0], 1, token_D.shape[0]))
    return jnp.concatenate([token_B1D, x_BND + bias_D], axis=1) + table_TD


def _where_layer(index_S: jax.Array, y_BTD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Returns `y_BTD` in the rows of stages that have a layer (index 0 or more), `x_BTD` in the others."""
    spec = jax.typeof(x_BTD).sharding.spec
    select = jax.shard_map(
        lambda index, y, x: jnp.where(index[0] >= 0, y, x), in_specs=(P("stage"), spec, spec), out_specs=spec
    )
    return select(index_S, y_BTD, x_BTD)
