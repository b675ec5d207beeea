"""LM head and cross-entropy in one operation that never holds all logits.

Float32 logits are the largest array of a language model: 64 sequences of 8,192 tokens with a vocabulary of 128,256 take
250 GiB. Here tokens are processed in chunks. The forward pass computes the logits of a chunk, its loss and its part of
both gradients, then frees the logits: three head matmuls (logits, dx, dw) where rematerialization needs four.

In JAX an *unreduced* array is a partial sum on each device; a *reduced* one is replicated, with *unreduced* gradients.

Shape suffixes: B batch, T length, C = T / num_chunks, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.ops.dot import dot
from jaxinfra.ops.logits import softcapped
from jaxinfra.parallel.sharding import unreduced_zeros


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """Options of the loss.

    Attributes:
        num_chunks: number of chunks of a sequence; must divide its length. More chunks take less memory.
        z_loss: weight of `log(sum(exp(logits)))**2`, which keeps logits from drifting (PaLM, section 5).
        softcap: logits become `softcap * tanh(logits / softcap)` first (Gemma 2).
        unroll_loops: whether the loop over chunks is unrolled (see `mesh.needs_unrolled_loops`).
    """

    num_chunks: int = 1
    z_loss: float = 0.0
    softcap: float | None = None
    unroll_loops: bool = False


type Sums = tuple[jax.Array, tuple[jax.Array, jax.Array]]
"""`(entropy + z_loss, (entropy, z_loss))`: weighted sums over tokens, float32 scalars."""


def token_losses(
    logits_BTV: jax.Array, targets_BT: jax.Array, config: CrossEntropyConfig
) -> tuple[jax.Array, jax.Array]:
    """Computes cross-entropy and z-loss of each token, both float32 `[B, T]`, from float32 logits."""
    logits_BTV = softcapped(logits_BTV, config.softcap)
    largest_BT1 = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
    log_z_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV - largest_BT1), axis=-1)) + largest_BT1[..., 0]
    # A comparison instead of a gather also works with a sharded vocabulary.
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    return log_z_BT - target_BT, config.z_loss * jnp.square(log_z_BT)


def _split_chunks(num_chunks: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Splits `[B, T, ...]` to `[num_chunks, B, C, ...]`: for T = 6 and 2 chunks to positions 0, 2, 4 and 1, 3, 5.

    Chunks are interleaved so that a sharded length is sharded in the same way in every chunk.
    """

    def split(x: jax.Array) -> jax.Array:
        if num_chunks == 1:
            return x[None]  # JAX 0.11 cannot add a dimension of 1 to a reduced array by reshape
        B, T, *rest = x.shape
        return jnp.moveaxis(x.reshape(B, T // num_chunks, num_chunks, *rest), 2, 0)

    return jax.tree.map(split, arrays)


def _join_chunks(chunks: jax.Array) -> jax.Array:
    """Inverts `_split_chunks`."""
    num_chunks, B, C, *rest = chunks.shape
    return jnp.moveaxis(chunks, 0, 2).reshape(B, C * num_chunks, *rest)


def _loss_axes(w_DV: jax.Array) -> frozenset[str]:
    """Returns the mesh axes over which the loss is a partial sum: the axes that the head is *reduced* over."""
    return jax.typeof(w_DV).sharding.spec.reduced


def _chunk_sums(
    x_BCD: jax.Array, w_DV: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array, config: CrossEntropyConfig
) -> Sums:
    # Einsum makes the partial sums, as `jnp.sum` has no `out_sharding`.
    out = PartitionSpec(unreduced=_loss_axes(w_DV))
    entropy_BC, z_BC = token_losses(dot(x_BCD, w_DV).astype(jnp.float32), targets_BC, config)
    entropy = jnp.einsum("bc,bc->", entropy_BC, weights_BC, out_sharding=out)
    z = jnp.einsum("bc,bc->", z_BC, weights_BC, out_sharding=out)
    return entropy + z, (entropy, z)


def _zero_sums(w_DV: jax.Array) -> Sums:
    zero = unreduced_zeros((), jnp.dtype("float32"), PartitionSpec(unreduced=_loss_axes(w_DV)))
    return zero, (zero, zero)


def chunked_token_cross_entropy(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, config: CrossEntropyConfig
) -> jax.Array:
    """Returns the cross-entropy of each token, float32 `[B, T]`; differentiable with respect to `x_BTD` and `w_DV`.

    Only the logits of one chunk exist at a time; the backward pass rematerializes them.
    """

    @jax.checkpoint
    def chunk_losses(x_BCD: jax.Array, w_DV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        return token_losses(dot(x_BCD, w_DV).astype(jnp.float32), targets_BC, config)[0]

    if config.num_chunks == 1:
        return chunk_losses(x_BTD, w_DV, targets_BT)
    chunks = _split_chunks(config.num_chunks, x_BTD, targets_BT)
    _, losses = jax.lax.scan(
        lambda _, chunk: (None, chunk_losses(chunk[0], w_DV, chunk[1])), None, chunks, unroll=config.unroll_loops
    )
    return _join_chunks(losses)


def chunked_token_scores(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, config: CrossEntropyConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns for each token its log-probability, float32 `[B, T]`, and whether it is the likeliest, bool `[B, T]`.

    Of equal logits the first is the likeliest, as in `argmax`. Only the logits of one chunk exist at a time.
    """

    def scores(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x_BCD, targets_BC = chunk
        logits_BCV = dot(x_BCD, w_DV).astype(jnp.float32)
        # This is `argmax`, also for a sharded vocabulary.
        is_largest_BCV = logits_BCV == jnp.max(logits_BCV, axis=-1, keepdims=True)
        vocab = logits_BCV.shape[-1]
        first_BC = jnp.min(jnp.where(is_largest_BCV, jnp.arange(vocab), vocab), axis=-1)
        return None, (-token_losses(logits_BCV, targets_BC, config)[0], first_BC == targets_BC)

    chunks = _split_chunks(config.num_chunks, x_BTD, targets_BT)
    return jax.tree.map(_join_chunks, jax.lax.scan(scores, None, chunks, unroll=config.unroll_loops)[1])


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_cross_entropy(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, config: CrossEntropyConfig
) -> Sums:
    """Sums the weighted losses of all tokens.

    Args:
        x_BTD: hidden states after the final norm, in the compute dtype.
        w_DV: the gathered head (see `Partitioner.gather_weight`).
        targets_BT: target tokens, int32.
        weights_BT: weight of each token, float32.
        config: options of the loss.

    Returns:
        `(entropy + z_loss, (entropy, z_loss))` in nats. Each is *unreduced* over the axes that the head is *reduced*
        over: reshard it to `P()` for its value. Only the first is differentiable, with respect to `x_BTD` and `w_DV`.
    """

    def body(sums: Sums, chunk: tuple[jax.Array, ...]) -> tuple[Sums, None]:
        x, targets, weights = chunk
        return jax.tree.map(jnp.add, sums, _chunk_sums(x, w_DV, targets, weights, config)), None

    chunks = _split_chunks(config.num_chunks, x_BTD, targets_BT, weights_BT)
    return jax.lax.scan(body, _zero_sums(w_DV), chunks, unroll=config.unroll_loops)[0]


type Gradients = tuple[jax.Array, jax.Array]
"""Gradients with respect to `x_BTD` and `w_DV`."""


def _forward(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, config: CrossEntropyConfig
) -> tuple[Sums, Gradients]:
    """Computes the sums, and the gradients of the first one, in one pass over the chunks."""
    loss_axes, w_spec = _loss_axes(w_DV), jax.typeof(w_DV).sharding.spec
    # JAX's type of the cotangent of an *unreduced* value is *reduced*.
    one = jnp.ones((), jnp.float32, out_sharding=PartitionSpec(reduced=loss_axes))

    def chunk_gradients(x: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[Sums, jax.Array, jax.Array]:
        def loss(x: jax.Array, w: jax.Array) -> Sums:
            return _chunk_sums(x, w, targets, weights, config)

        total, vjp, parts = jax.vjp(loss, x, w_DV, has_aux=True)
        return (total, parts), *vjp(one)

    if config.num_chunks == 1:
        sums, dx_BTD, dw_DV = chunk_gradients(x_BTD, targets_BT, weights_BT)
        return sums, (dx_BTD, dw_DV)

    def body(carry: tuple[Sums, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[tuple[Sums, jax.Array], jax.Array]:
        sums, dx, dw = chunk_gradients(*chunk)
        return jax.tree.map(jnp.add, carry, (sums, dw.astype(jnp.float32))), dx

    dw_spec = PartitionSpec(*w_spec.partitions, unreduced=loss_axes)
    start = (_zero_sums(w_DV), jnp.zeros(w_DV.shape, jnp.float32, out_sharding=dw_spec))
    chunks = _split_chunks(config.num_chunks, x_BTD, targets_BT, weights_BT)
    (sums, dw_DV), dx_chunks = jax.lax.scan(body, start, chunks, unroll=config.unroll_loops)
    return sums, (_join_chunks(dx_chunks), dw_DV.astype(w_DV.dtype))


def _backward(
    config: CrossEntropyConfig, gradients: Gradients, cotangents: Sums
) -> tuple[jax.Array, jax.Array, None, None]:
    """Scales the gradients of `_forward` with the cotangent of the loss, a scalar."""
    (dx_BTD, dw_DV), g = gradients, cotangents[0]
    # `dx` may be *unreduced*, and JAX multiplies partial sums only with *reduced* values. In a `shard_map` each device
    # scales its own part, and the product is a partial sum again.
    x_spec, g_spec = jax.typeof(dx_BTD).sharding.spec, jax.typeof(g).sharding.spec
    g_for_x = jax.reshard(g, g_spec.update(reduced=g_spec.reduced | x_spec.unreduced))
    in_specs = (x_spec, jax.typeof(g_for_x).sharding.spec)

    def multiply(d: jax.Array, g: jax.Array) -> jax.Array:
        return d * jax.lax.pcast(g.astype(d.dtype), tuple(g_spec.reduced), to="varying")

    dx_BTD = jax.shard_map(multiply, in_specs=in_specs, out_specs=x_spec)(dx_BTD, g_for_x)
    return dx_BTD, dw_DV * g.astype(dw_DV.dtype), None, None


fused_cross_entropy.defvjp(_forward, _backward)
