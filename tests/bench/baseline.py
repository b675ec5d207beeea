"""The baseline of `bench step`: the train step of a small Llama, written by hand in JAX and optax.

It imports nothing of jaxinfra, but uses the same tricks for XLA's CPU backend (`matmul` and `tensordot_as_matmul`).

`python -m tests.bench.baseline CONFIG`, with a `BaselineConfig` in JSON, runs one step in a new process.

Shape suffixes: B batch, T sequence length, W = T + 1, D hidden size, H heads, K head dim, F MLP dim, V vocabulary; in a
matmul M and N are the dimensions that stay, and K is the one that is contracted.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

type Params = dict[str, jax.Array]
type TrainStep = Callable[[Params, optax.OptState, jax.Array], tuple[Params, optax.OptState, jax.Array]]

UNSTACKED = ("embedding", "head", "norm")  # all other parameters have a first dimension over layers
# Sharded dimension of each parameter; norms are replicated.
FSDP_DIMS = {"query": 1, "key": 1, "value": 1, "out": 3, "gate": 1, "up": 1, "down": 2, "embedding": 1, "head": 0}


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """The model, its batch and its optimizer; parameters are float32."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    mlp_dim: int
    seq_len: int
    batch_size: int
    norm_eps: float
    rope_theta: float
    peak_lr: float
    weight_decay: float
    compute_dtype: str
    naive_matmul: bool = False  # without the tricks for CPUs


def init_params(key: jax.Array, config: BaselineConfig) -> Params:
    """Initializes the parameters in float32."""
    L, D, H, F = config.num_layers, config.hidden_size, config.num_heads, config.mlp_dim
    shapes = {
        **dict.fromkeys(("query", "key", "value"), (L, D, H, D // H)),
        "out": (L, H, D // H, D),
        **dict.fromkeys(("gate", "up"), (L, D, F)),
        "down": (L, F, D),
        "embedding": (config.vocab_size, D),
        "head": (D, config.vocab_size),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    weights = {
        name: jax.random.normal(keys[name], shape) * (F if name == "down" else D) ** -0.5
        for name, shape in shapes.items()
    }
    return weights | {"attention_norm": jnp.ones((L, D)), "mlp_norm": jnp.ones((L, D)), "norm": jnp.ones(D)}


@jax.custom_vjp
def matmul(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
    """Computes `x @ w`; for the weight gradient it copies `x` transposed, as XLA's fast CPU kernels need it."""
    return x_MK @ w_KN


def _matmul_forward(x_MK: jax.Array, w_KN: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_MK @ w_KN, (x_MK, w_KN)


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], g_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MK, w_KN = residuals
    x_KM = with_layout_constraint(x_MK.T, Layout(major_to_minor=(0, 1)))
    # `dot_general` contracts the last dimension of both, which is fast without a copy; with `g @ w.T`, whose transpose
    # is an operation of its own, XLA uses the slow kernel here, too.
    return jax.lax.dot_general(g_MN, w_KN, (((1,), (1,)), ((), ()))), x_KM @ g_MN


matmul.defvjp(_matmul_forward, _matmul_backward)


def tensordot_as_matmul(x: jax.Array, w: jax.Array, num_dims: int) -> jax.Array:
    """Contracts the last `num_dims` dimensions of `x` with the first of `w`, as one matmul of two matrices."""
    contracted = int(np.prod(w.shape[:num_dims]))
    y = matmul(x.reshape(-1, contracted), w.reshape(contracted, -1))
    return y.reshape(*x.shape[: x.ndim - num_dims], *w.shape[num_dims:])


def loss_fn(params: Params, tokens_BW: jax.Array, config: BaselineConfig, mesh: Mesh | None = None) -> jax.Array:
    """Computes the mean cross-entropy of the next token in float32."""
    dtype = jnp.dtype(config.compute_dtype)
    tensordot = jnp.tensordot if config.naive_matmul else tensordot_as_matmul
    half = config.hidden_size // config.num_heads // 2
    angles = jnp.arange(config.seq_len)[:, None, None] * config.rope_theta ** -(jnp.arange(half) / half)  # [T, 1, K/2]
    cos, sin = jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    def shard(x_BTD: jax.Array) -> jax.Array:
        if mesh is None:
            return x_BTD
        return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, PartitionSpec("fsdp")))

    def rms_norm(x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * scale_D).astype(dtype)

    def rotate(x_BTHK: jax.Array) -> jax.Array:
        a, b = x_BTHK[..., :half], x_BTHK[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def layer(x_BTD: jax.Array, w: Params) -> tuple[jax.Array, None]:
        w = {name: a if name.endswith("norm") else a.astype(dtype) for name, a in w.items()}
        h = rms_norm(x_BTD, w["attention_norm"])
        q, k, v = (tensordot(h, w[name], 1) for name in ("query", "key", "value"))
        attention = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x_BTD = x_BTD + tensordot(attention, w["out"], 2)
        h = rms_norm(x_BTD, w["mlp_norm"])
        hidden = jax.nn.silu(tensordot(h, w["gate"], 1)) * tensordot(h, w["up"], 1)
        return shard(x_BTD + tensordot(hidden, w["down"], 1)), None

    x_BTD = shard(params["embedding"].astype(dtype)[tokens_BW[:, :-1]])
    x_BTD, _ = jax.lax.scan(layer, x_BTD, {name: a for name, a in params.items() if name not in UNSTACKED})
    x_BTD = rms_norm(x_BTD, params["norm"])
    logits_BTV = tensordot(x_BTD, params["head"].astype(dtype), 1).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BW[:, 1:]).mean()


def make_train_step(config: BaselineConfig, num_devices: int) -> tuple[TrainStep, Params, optax.OptState, jax.Array]:
    """Returns the jitted step, which donates its state, with initial parameters, optimizer state and a batch."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",), axis_types=(AxisType.Auto,))
    optimizer = optax.adamw(config.peak_lr, b1=0.9, b2=0.95, weight_decay=config.weight_decay)

    def step(params: Params, opt_state: optax.OptState, tokens_BW: jax.Array):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens_BW, config, mesh if num_devices > 1 else None)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, loss

    specs = {name: PartitionSpec(*[None] * dim, "fsdp") for name, dim in FSDP_DIMS.items()}
    specs |= dict.fromkeys(("attention_norm", "mlp_norm", "norm"), PartitionSpec())
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.jit(lambda key: init_params(key, config), out_shardings=shardings)(jax.random.key(0))
    opt_state = jax.jit(optimizer.init)(params)
    shape = (config.batch_size, config.seq_len + 1)
    tokens_BW = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    batch = jax.device_put(tokens_BW, NamedSharding(mesh, PartitionSpec("fsdp")))
    return jax.jit(step, donate_argnums=(0, 1)), params, opt_state, batch


def main() -> None:
    """Runs one step and prints its loss."""
    step, params, opt_state, batch = make_train_step(BaselineConfig(**json.loads(sys.argv[1])), 1)
    *_, loss = step(params, opt_state, batch)
    print(f"step 1 loss {float(loss):.4f}", flush=True)


if __name__ == "__main__":
    main()
