"""A language model that is a plain Flax module, with causal convolutions, on the data of quickstart.py.

`ConvLM` knows nothing of this package; `ConvModel` says how to make it. Copy both to train a module of your own.
"""

from dataclasses import dataclass

import jax
from flax import nnx

from jaxinfra import AdamW, Cosine, FlaxModel, OptimConfig, Precision, Run, TokenData, TrainConfig
from jaxinfra.config.limits import DecayRate, PositiveInt


class Block(nnx.Module):
    """A gated causal convolution that adds to the residual stream."""

    def __init__(self, width: int, dilation: int, dropout: float, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.conv = nnx.Conv(width, 2 * width, 4, kernel_dilation=dilation, padding="CAUSAL", rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the stream after the block, `[batch, length, width]`."""
        return x + self.dropout(self.out(nnx.glu(self.conv(self.norm(x)))))


class ConvLM(nnx.Module):
    """A causal convolutional language model."""

    def __init__(self, vocab_size: int, width: int, layers: int, dropout: float, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab_size, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.blocks = nnx.List([Block(width, 2**i, dropout, rngs) for i in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits of the next tokens, `[batch, length, vocab_size]`."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True, kw_only=True)
class ConvModel(FlaxModel):
    """The fields of `ConvLM` that a config or the command line may set."""

    vocab_size: PositiveInt = 4096
    width: PositiveInt = 192
    layers: PositiveInt = 5
    dropout: DecayRate = 0.1

    def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns a module with its first values."""
        return ConvLM(self.vocab_size, self.width, self.layers, self.dropout, rngs)


def config() -> Run:
    return Run(
        name="flax-module",
        model=ConvModel(),
        data=TokenData(
            store="stores/python-stdlib",
            recipe="configs/data/python_stdlib.py",
            seq_len=256,
            mask_documents=False,  # the convolutions see the document before
        ),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps=20), peak_lr=3e-3),
        train=TrainConfig(steps=250, global_batch=16, eval_every=125),
    )
