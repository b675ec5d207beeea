"""The head and its cross-entropy as one operation that never holds all logits.

`[batch, length, vocab]` logits in float32 are the largest array of a language model: 64 sequences of 8,192 tokens
with 128,256 words are 250 GiB. Here the tokens pass in chunks; each chunk makes its logits, its loss and, if
gradients are wanted, its share of both gradients at once, and forgets the logits. So the head's product is
computed three times a step (logits, and the two gradients), not four as with recomputation.

Shape suffixes: B batch, T length, C = T / chunks, D width, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.ops.dot import dot
from jaxinfra.parallel.sharding import unreduced_zeros


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """How the loss of one token is computed from its logits.

    Attributes:
        chunks: in how many parts a sequence passes the head; more is less memory. Must divide the length.
        z_loss: weight of `log(sum(exp(logits)))**2`, which keeps logits from drifting (PaLM, section 5).
        softcap: logits become `softcap * tanh(logits / softcap)` first (Gemma 2).
    """

    chunks: int = 1
    z_loss: float = 0.0
    softcap: float | None = None


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array, config: CrossEntropy) -> tuple[jax.Array, jax.Array]:
    """The plain form: cross-entropy and z-loss of each token, both float32 `[B, T]`, from float32 logits."""
    if config.softcap is not None:
        logits_BTV = config.softcap * jnp.tanh(logits_BTV / config.softcap)
    largest_BT1 = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
    log_z_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV - largest_BT1), axis=-1)) + largest_BT1[..., 0]
    hit_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)
    return log_z_BT - target_BT, config.z_loss * jnp.square(log_z_BT)


def _chunks(x: jax.Array, chunks: int) -> jax.Array:
    """`[B, T, ...]` to `[chunks, B, C, ...]`; chunk j has the positions t with `t % chunks == j`.

    Interleaved, not consecutive, so that a sharded length stays sharded alike in every chunk.
    """
    if chunks == 1:
        return x[None]  # JAX 0.11 cannot reshape by a dimension of 1 what is reduced over a mesh axis
    B, T, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, T // chunks, chunks, *rest), 2, 0)


def _partial_sums(w_DV: jax.Array) -> frozenset[str]:
    """The mesh axes that the loss of one device is a partial sum over: those that the head is reduced over."""
    return jax.typeof(w_DV).sharding.spec.reduced


def _chunk_sums(x_BCD, w_DV, targets_BC, weights_BC, config: CrossEntropy):
    """Weighted sums over one chunk: entropy plus z-loss, and (entropy, z-loss); unreduced scalars."""
    out = PartitionSpec(unreduced=_partial_sums(w_DV))
    entropy_BC, z_BC = token_losses(dot(x_BCD, w_DV).astype(jnp.float32), targets_BC, config)
    entropy = jnp.einsum("bc,bc->", entropy_BC, weights_BC, out_sharding=out)
    z = jnp.einsum("bc,bc->", z_BC, weights_BC, out_sharding=out)
    return entropy + z, (entropy, z)


def _zero(w_DV: jax.Array) -> jax.Array:
    return unreduced_zeros((), jnp.dtype("float32"), PartitionSpec(unreduced=_partial_sums(w_DV)))


def chunked_token_losses(x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, config: CrossEntropy) -> jax.Array:
    """Returns the cross-entropy of each token, float32 `[B, T]`, differentiable by `x_BTD` and `w_DV`.

    The logits of a chunk exist alone, forward and, computed again, backward.
    """

    @jax.checkpoint
    def of_chunk(x_BCD: jax.Array, w_DV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        return token_losses(dot(x_BCD, w_DV).astype(jnp.float32), targets_BC, config)[0]

    if config.chunks == 1:
        return of_chunk(x_BTD, w_DV, targets_BT)
    pieces = tuple(_chunks(a, config.chunks) for a in (x_BTD, targets_BT))
    _, losses = jax.lax.scan(lambda _, chunk: (None, of_chunk(chunk[0], w_DV, chunk[1])), None, pieces)
    return jnp.moveaxis(losses, 0, 2).reshape(targets_BT.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, config: CrossEntropy
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The weighted sum of the losses of all tokens, from the last hidden state.

    Args:
        x_BTD: hidden states after the last norm, in the compute dtype.
        w_DV: the head, ready for use (see `Partitioner.weight`).
        targets_BT: the right words, int32.
        weights_BT: how much each token counts, float32.
        config: chunks, z-loss, soft cap.

    Returns:
        `(entropy + z_loss, (entropy, z_loss))`, float32 scalars: sums over all tokens in nats, not means. Each is
        unreduced over the mesh axes that the head is reduced over: reshard it to `P()` where it is wanted.
        The first alone is differentiable, by `x_BTD` and `w_DV`.
    """

    def body(sums, chunk):
        x, targets, weights = chunk
        total, parts = _chunk_sums(x, w_DV, targets, weights, config)
        return jax.tree.map(jnp.add, sums, (total, parts)), None

    zero = _zero(w_DV)
    pieces = tuple(_chunks(a, config.chunks) for a in (x_BTD, targets_BT, weights_BT))
    return jax.lax.scan(body, (zero, (zero, zero)), pieces)[0]


def _forward(x_BTD, w_DV, targets_BT, weights_BT, config: CrossEntropy):
    """The sums, and the gradients by `x_BTD` and `w_DV` of their first, all in one pass over the chunks."""
    one = jnp.ones((), jnp.float32, out_sharding=PartitionSpec(reduced=_partial_sums(w_DV)))

    def gradients(x, targets, weights):
        def loss(x, w):
            return _chunk_sums(x, w, targets, weights, config)

        total, pull, parts = jax.vjp(loss, x, w_DV, has_aux=True)
        return (total, parts), *pull(one)

    if config.chunks == 1:
        sums, dx_BTD, dw_DV = gradients(x_BTD, targets_BT, weights_BT)
        return sums, (dx_BTD, dw_DV)

    def body(carry, chunk):
        sums, dx, dw = gradients(*chunk)
        return jax.tree.map(jnp.add, carry, (sums, dw.astype(jnp.float32))), dx

    zero = _zero(w_DV)
    w_spec = jax.typeof(w_DV).sharding.spec
    dw_zero = jnp.zeros(
        w_DV.shape, jnp.float32, out_sharding=PartitionSpec(*w_spec.partitions, unreduced=_partial_sums(w_DV))
    )
    pieces = tuple(_chunks(a, config.chunks) for a in (x_BTD, targets_BT, weights_BT))
    (sums, dw_DV), dx = jax.lax.scan(body, ((zero, (zero, zero)), dw_zero), pieces)
    return sums, (jnp.moveaxis(dx, 0, 2).reshape(x_BTD.shape), dw_DV.astype(w_DV.dtype))


def _backward(config: CrossEntropy, gradients, cotangents):
    dx_BTD, dw_DV = gradients
    g = cotangents[0]
    x_spec, g_spec = jax.typeof(dx_BTD).sharding.spec, jax.typeof(g).sharding.spec
    g_for_x = jax.reshard(g, g_spec.update(reduced=g_spec.reduced | x_spec.unreduced))
    in_specs = (x_spec, jax.typeof(g_for_x).sharding.spec)

    def times(d: jax.Array, g: jax.Array) -> jax.Array:
        return d * jax.lax.pcast(g.astype(d.dtype), tuple(g_spec.reduced), to="varying")

    dx_BTD = jax.shard_map(times, in_specs=in_specs, out_specs=x_spec)(dx_BTD, g_for_x)
    return dx_BTD, dw_DV * g.astype(dw_DV.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
