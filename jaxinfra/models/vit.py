"""The vision transformer (Dosovitskiy et al. 2021, "An image is worth 16x16 words") as an image classifier.

An image is cut into square patches. A matmul projects each patch to one position, and each position gets a learned
embedding. Layers are pre-norm and bidirectional. The head reads the class token, or the mean over positions.

Positions are few and, with a class token, odd in number: 14 x 14 patches and the token are 197. Attention never shards
them, and the residual stream only if the shards divide their number.

Shape suffixes: B batch, H and W height and width of an image, N patches, T positions, P features of a patch, D width,
C classes; 1 is a dimension of size 1.
"""

import math
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
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP, SEQUENCE, Norm, NormConfig, ParamFactory
from jaxinfra.models.mixer import MixerOptions, TokenInfo
from jaxinfra.models.model import LayeredModelConfig
from jaxinfra.models.module import Inputs, LayeredModule, LayerStats, StageLayers
from jaxinfra.models.remat import Remat, name_tensor, remat
from jaxinfra.ops.attention import Kernel
from jaxinfra.ops.dot import dot
from jaxinfra.ops.dropout import DROPOUT_FIELD, EMBEDDING_LAYER, dropout, layer_bits
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import constant, normal


class HasImages(Protocol):
    """A data config with images: their height and width in pixels, and their color channels."""

    image_size: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(LayeredModelConfig):
    """The sizes and options of an image classifier.

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
        return self.num_patches + 1 if self.pool == "class" else self.num_patches

    def problems(self) -> Iterable[Problem]:
        """Yields sizes that are not divisible."""
        if self.image_size % self.patch_size:
            divisors = [n for n in range(1, self.patch_size) if self.image_size % n == 0]
            message, fix = "patch_size must divide image_size", f"use patch_size={max(divisors)}"
            yield Problem(fields=("image_size", "patch_size"), message=message, fix=fix)
        if self.hidden_size % self.num_heads:
            fix = f"use hidden_size={math.ceil(self.hidden_size / self.num_heads) * self.num_heads}"
            yield Problem(fields=("hidden_size", "num_heads"), message="num_heads must divide hidden_size", fix=fix)

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
            actual = getattr(data, name)
            if actual != getattr(self, name):
                fix = f"use model.{name}={actual}"
                yield Problem(fields=(f"model.{name}",), message=f"the images have {actual}", fix=fix)

    @override
    def positions(self, data: HasImages) -> int:
        return self.length

    @override
    def build(self, partitioner: Partitioner) -> "VisionTransformer":
        # The number of positions is mostly odd, so they are sharded where that is possible only (see the module).
        partitioner = replace(partitioner, rules=replace(partitioner.rules, sequence=()))
        if self.length % partitioner.num_shards("positions"):
            partitioner = replace(partitioner, rules=replace(partitioner.rules, block_sequence=()))
        return VisionTransformer(self, partitioner)


class EncoderBlock(nnx.Module):
    """One layer: attention and MLP, each after a norm; their outputs are added to the residual stream."""

    def __init__(self, config: VisionTransformerConfig, params: ParamFactory):
        self.partitioner, self.dropout = params.partitioner, config.dropout
        hidden, heads = config.hidden_size, config.num_heads
        norm_config = NormConfig(type="layernorm", eps=config.norm_eps)
        norm = partial(Norm, hidden, norm_config, params=params)
        # Each layer adds two outputs to the residual stream. This scale keeps its variance near one.
        out_scale = (2 * config.num_layers) ** -0.5
        options = MixerOptions(
            hidden_size=hidden, norm=norm_config, out_scale=out_scale, causal=False, kernel=config.attention_kernel
        )
        attention = Attention(num_heads=heads, rope=None, qkv_bias=True, out_bias=True)
        self.attention_norm = norm()
        self.attention = attention.build(options, params)
        self.mlp_norm = norm()
        self.mlp = MLP(dim=config.mlp_dim, activation="gelu", bias=True).build(hidden, out_scale, params)

    def __call__(self, x_BTD: jax.Array, bits_BT: jax.Array | None) -> jax.Array:
        """Returns the residual stream after the layer; `bits_BT` are its dropout bits."""
        y_BTD, _ = self.attention(self.attention_norm(x_BTD), TokenInfo(), None)
        x_BTD += dropout(y_BTD, bits_BT, 0, self.dropout)
        y_BTD = self.mlp(self.partitioner.gather_sequence(self.mlp_norm(x_BTD), "mlp"))
        return x_BTD + dropout(y_BTD, bits_BT, 1, self.dropout)


class VisionTransformer(LayeredModule):
    """A classifier from images to logits."""

    def __init__(self, config: VisionTransformerConfig, partitioner: Partitioner):
        self.config, self.partitioner = config, partitioner
        hidden, classes, features = config.hidden_size, config.num_classes, config.patch_size**2 * config.channels
        params = ParamFactory(partitioner=partitioner)
        param, learned_init = params.param, normal(0.02)  # the scale of positions in the published code
        self.patches = param((features, hidden), (None, "embed"), normal(features**-0.5), "embedding", in_dims=1)
        self.patches_bias = param((hidden,), (None,), constant(0.0), "bias")
        self.token = param((hidden,), (None,), learned_init, "embedding") if config.pool == "class" else None
        self.positions = param((config.length, hidden), (None, "embed"), learned_init, "embedding")
        self.blocks = EncoderBlock(config, replace(params, num_layers=config.num_layers))
        self.norm = Norm(hidden, NormConfig(type="layernorm", eps=config.norm_eps), params=params)
        self.classes = param((hidden, classes), ("embed", None), normal(hidden**-0.5), "head", in_dims=1)
        self.classes_bias = param((classes,), (None,), constant(0.0), "bias")

    @override
    def embed(self, batch: Inputs, /) -> jax.Array:
        """Embeds patches: `[B, T, D]` in the compute dtype.

        The batch has "images" `[B, H, W, channels]`, float32, and may have "dropout" `[B, T]` (see `ops.dropout`).
        """
        partitioner, gather = self.partitioner, self.partitioner.gather_weight
        patches_BNP = to_patches(batch["images"], self.config.patch_size).astype(partitioner.compute_dtype)
        x_BND = dot(patches_BNP, gather(self.patches[...], (None, "embed")))
        weights = [gather(self.patches_bias[...], (None,)), gather(self.positions[...], (None, "embed"))]
        if self.token is not None:
            weights.append(gather(self.token[...], (None,)))
        x_BTD = partitioner.shard(partitioner.map_local(_add_learned, x_BND, *weights), "batch", "positions", None)
        return dropout(x_BTD, layer_bits(batch.get(DROPOUT_FIELD), EMBEDDING_LAYER), 0, self.config.dropout)

    @override
    def apply_layers(
        self, x_BTD: jax.Array, batch: Inputs, stage_layers: StageLayers | None = None, /
    ) -> tuple[jax.Array, LayerStats]:
        def layer(x_BTD: jax.Array, xs: tuple[EncoderBlock, jax.Array]) -> tuple[jax.Array, None]:
            block, index = xs
            return block(name_tensor(x_BTD, "layer_input"), layer_bits(batch.get(DROPOUT_FIELD), index)), None

        indices = jnp.arange(self.config.num_layers) if stage_layers is None else stage_layers.indices
        unroll = self.partitioner.unrolls_layers(self.config.num_layers)
        step = remat(layer, self.config.remat, alone=not unroll)
        x_BTD, _ = jax.lax.scan(step, x_BTD, (self.blocks, indices), unroll=unroll)
        return x_BTD, {}

    @override
    def output(self, x_BTD: jax.Array, /) -> jax.Array:
        """Pools positions and returns the logits of the classes, float32 `[B, C]`."""
        gather = self.partitioner.gather_weight
        x_BTD = self.partitioner.shard(x_BTD, *SEQUENCE, None)
        if self.token is not None:
            x_BTD = x_BTD[:, :1]  # only the class token
        pooled_BD = jnp.mean(self.norm(x_BTD, SEQUENCE), axis=1)
        y_BC = dot(pooled_BD, gather(self.classes[...], ("embed", None)))
        bias_C = gather(self.classes_bias[...], (None,))
        return self.partitioner.map_local(jnp.add, y_BC, bias_C).astype(jnp.float32)

    @override
    def uniform(self, layers: np.ndarray) -> bool:
        return True  # the weights of padding are zeros, with which a pre-norm layer returns its input

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
    """Reshapes `[B, H, W, channels]` to `[B, N, P]`: patches, and the pixels in them, in row-major order.

    A 4 x 4 image has four patches of size 2: top left, top right, bottom left, bottom right.
    """
    B, H, W, channels = images.shape
    rows, columns = H // patch_size, W // patch_size
    out = P(jax.typeof(images).sharding.spec.partitions[0])
    grid = images.reshape(B, rows, patch_size, columns, patch_size, channels, out_sharding=out)
    shape = (B, rows * columns, patch_size * patch_size * channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(shape, out_sharding=out)


def _add_learned(
    x_BND: jax.Array, bias_D: jax.Array, positions_TD: jax.Array, token_D: jax.Array | None = None
) -> jax.Array:
    """Adds the bias of patches and the position embeddings; puts the class token, if any, before the patches."""
    x_BTD = x_BND + bias_D
    if token_D is not None:
        token_B1D = jnp.broadcast_to(token_D, (x_BND.shape[0], 1, token_D.shape[0]))
        x_BTD = jnp.concatenate([token_B1D, x_BTD], axis=1)
    return x_BTD + positions_TD
