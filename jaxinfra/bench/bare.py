"""The yardstick of `bench step`: the train step of a small Llama, written by hand in JAX and optax.

It stands for what somebody would write who needs this one model alone: a dict of arrays, one function, `jit`.
It uses nothing of jaxinfra, and knows the same of XLA's CPU back end: products of rank 2, and the rows of
weight gradients turned round in memory (see `matmul`). `Sizes.naive` leaves that out, to show what it is worth.

Run as a script (`python -m jaxinfra.bench.bare SIZES`, SIZES in JSON) it makes one step from a cold process.

Shape suffixes: B batch, T length, W = T + 1, D width, H heads, K head width, F MLP width, V vocabulary.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

type Params = dict[str, Any]
type Step = Callable[[Params, Any, jax.Array], tuple[Params, Any, jax.Array]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model, its batch and its number format; `naive` multiplies arrays as they come."""

    vocab: int
    layers: int
    width: int
    heads: int
    mlp: int
    length: int
    batch: int
    eps: float
    theta: float
    peak_lr: float
    weight_decay: float
    compute: str
    naive: bool = False


def init(key: jax.Array, sizes: Sizes) -> Params:
    """First parameters in float32; those of the layers are stacked."""
    L, D, H, F, V = sizes.layers, sizes.width, sizes.heads, sizes.mlp, sizes.vocab
    shapes = {
        "query": (L, D, H, D // H),
        "key": (L, D, H, D // H),
        "value": (L, D, H, D // H),
        "out": (L, H, D // H, D),
        "gate": (L, D, F),
        "up": (L, D, F),
        "down": (L, F, D),
        "embedding": (V, D),
        "head": (D, V),
    }
    keys = jax.random.split(key, len(shapes))
    drawn = {
        name: jax.random.normal(k, shape) * (F if name == "down" else D) ** -0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    norms = {"attention_norm": jnp.ones((L, D)), "mlp_norm": jnp.ones((L, D)), "norm": jnp.ones(D)}
    return drawn | norms


OUTSIDE = ("embedding", "head", "norm")
"""The parameters that are not stacked layers."""
FSDP = {"query": 1, "key": 1, "value": 1, "out": 3, "gate": 1, "up": 1, "down": 2, "embedding": 1, "head": 0}
"""The dimension along which a parameter is sharded; norms are whole."""


@jax.custom_vjp
def matmul(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
    """`x @ w`, whose weight gradient reads `x` transposed in memory: XLA's fast kernels want that on CPUs."""
    return x_MK @ w_KN


def _matmul_forward(x_MK: jax.Array, w_KN: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_MK @ w_KN, (x_MK, w_KN)


def _matmul_backward(kept: tuple[jax.Array, jax.Array], g_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MK, w_KN = kept
    x_KM = with_layout_constraint(x_MK.T, Layout(major_to_minor=(0, 1)))
    # A written-out `w.T` would send the other product to the slow loop as well.
    return jax.lax.dot_general(g_MN, w_KN, (((1,), (1,)), ((), ()))), x_KM @ g_MN


matmul.defvjp(_matmul_forward, _matmul_backward)


def flat_product(x: jax.Array, w: jax.Array, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` dimensions of `x` with the first of `w`, as one product of rank 2."""
    inner = int(np.prod(w.shape[:contract]))
    y = matmul(x.reshape(-1, inner), w.reshape(inner, -1))
    return y.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])


def loss(params: Params, tokens_BW: jax.Array, sizes: Sizes, mesh: Mesh | None = None) -> jax.Array:
    """The mean cross-entropy of the next token over all positions, float32."""
    dtype = jnp.dtype(sizes.compute)
    product = jnp.tensordot if sizes.naive else flat_product
    half = sizes.width // sizes.heads // 2
    angles = jnp.arange(sizes.length)[:, None, None] * sizes.theta ** -(jnp.arange(half) / half)
    cos, sin = jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    def pin(x_BTD: jax.Array) -> jax.Array:
        if mesh is None:
            return x_BTD
        return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, PartitionSpec("fsdp")))

    def norm(x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + sizes.eps) * scale_D).astype(dtype)

    def rotate(x_BTHK: jax.Array) -> jax.Array:
        a, b = x_BTHK[..., :half], x_BTHK[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def layer(x_BTD: jax.Array, w: Params) -> tuple[jax.Array, None]:
        w = {name: a if name.endswith("norm") else a.astype(dtype) for name, a in w.items()}
        h = norm(x_BTD, w["attention_norm"])
        q, k, v = (product(h, w[name], 1) for name in ("query", "key", "value"))
        seen = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x_BTD = x_BTD + product(seen, w["out"], 2)
        h = norm(x_BTD, w["mlp_norm"])
        hidden = jax.nn.silu(product(h, w["gate"], 1)) * product(h, w["up"], 1)
        return pin(x_BTD + product(hidden, w["down"], 1)), None

    x_BTD = pin(params["embedding"].astype(dtype)[tokens_BW[:, :-1]])
    x_BTD, _ = jax.lax.scan(layer, x_BTD, {name: a for name, a in params.items() if name not in OUTSIDE})
    logits_BTV = product(norm(x_BTD, params["norm"]), params["head"].astype(dtype), 1).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BW[:, 1:]).mean()


def build(sizes: Sizes, devices: int) -> tuple[Step, Params, Any, jax.Array]:
    """The jitted step, its first parameters and optimiser state (both given up by it), and a random batch."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",), axis_types=(AxisType.Auto,))
    optimizer = optax.adamw(sizes.peak_lr, b1=0.9, b2=0.95, weight_decay=sizes.weight_decay)
    pinned = mesh if devices > 1 else None

    def step(params: Any, state: Any, tokens_BW: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens_BW, sizes, pinned)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    specs = {name: PartitionSpec(*[None] * dim, "fsdp") for name, dim in FSDP.items()}
    specs |= dict.fromkeys(("attention_norm", "mlp_norm", "norm"), PartitionSpec())
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.jit(lambda key: init(key, sizes), out_shardings=shardings)(jax.random.key(0))
    state = jax.jit(optimizer.init)(params)
    tokens_BW = np.random.default_rng(0).integers(0, sizes.vocab, (sizes.batch, sizes.length + 1), np.int32)
    batch = jax.device_put(tokens_BW, NamedSharding(mesh, PartitionSpec("fsdp")))
    return jax.jit(step, donate_argnums=(0, 1)), params, state, batch


def main() -> None:
    """Makes one step and says so."""
    step, params, state, batch = build(Sizes(**json.loads(sys.argv[1])), 1)
    *_, value = step(params, state, batch)
    print(f"step 1 loss {float(value):.4f}", flush=True)


if __name__ == "__main__":
    main()
