"""`bench accelerator --only kernels`: the kernels of the platform beside plain definitions, on one device.

Errors are those of the output and of all gradients, relative to the largest value of each, from the definition in
float32 with exact matmuls. The definition in the kernel's own dtype has errors, too: they say what rounding costs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfra.ops import attention, gated_delta, quantized
from jaxinfra.ops.attention import AttentionSpec, Kernel
from jaxinfra.ops.cross_entropy import CrossEntropyConfig, fused_cross_entropy
from jaxinfra.ops.grouped import grouped_dot
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import Quantize
from tests.bench.accelerator_timing import Case, NotMeasuredError, Part, Setting
from tests.bench.table import Columns, TableRow

COLUMNS: Columns = {
    "kernel_ms": ("kernel", "{:.3f} ms"),
    "plain_ms": ("plain", "{:.3f} ms"),
    "kernel_gradient_ms": ("kernel + gradients", "{:.3f} ms"),
    "plain_gradient_ms": ("plain + gradients", "{:.3f} ms"),
    "error": ("error", "{:.1e}"),
    "plain_error": ("plain error", "{:.1e}"),
}
ATTENTION_SPECS = {
    "causal": AttentionSpec(),
    "window": AttentionSpec(window=128),
    "soft cap": AttentionSpec(softcap=30.0),
    "documents": AttentionSpec(),
}

type Function = Callable[..., jax.Array]


def random_arrays(*shapes: Sequence[int], dtype: str) -> list[jax.Array]:
    """Returns normally distributed arrays on the first device of this process."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def _with_gradients(function: Function) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function that also returns the gradients of its output's sum with random weights."""

    def both(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(function, *arrays)
        weights = jax.random.normal(jax.random.key(1), y.shape, jnp.float32)  # the same for all dtypes but for rounding
        return y, *pull(weights.astype(y.dtype))

    return both


def _per_device(function: Function) -> Function:
    """Returns a function that runs as in a model: on the shards of each device."""
    spec = PartitionSpec()
    return lambda *arrays: jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def _largest_error(actual: Sequence[jax.Array], exact: Sequence[jax.Array]) -> float:
    errors = [
        jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)) for a, b in zip(actual, exact, strict=True)
    ]
    return float(jnp.max(jnp.stack(errors)))  # NaN if one is


def compare(
    setting: Setting, function: Function, plain: Function, arrays: Sequence[jax.Array], *, gradients: bool = True
) -> TableRow:
    """Times a kernel and its plain definition on the same arrays, and compares their values."""

    def timed(function: Function) -> tuple[float, float | None, Sequence[jax.Array]]:
        forward, both = jax.jit(function), jax.jit(_with_gradients(function))
        forward_s = setting.seconds(lambda: forward(*arrays))
        if not gradients:
            return 1e3 * forward_s, None, [forward(*arrays)]
        return 1e3 * forward_s, 1e3 * setting.seconds(lambda: both(*arrays)), both(*arrays)

    with jax.default_matmul_precision("highest"):
        as_float32 = [x.astype(jnp.float32) for x in arrays]
        exact = jax.jit(_with_gradients(plain))(*as_float32) if gradients else [jax.jit(plain)(*as_float32)]
    kernel_ms, kernel_gradient_ms, actual = timed(function)
    plain_ms, plain_gradient_ms, plain_actual = timed(plain)
    return {
        "kernel_ms": kernel_ms,
        "plain_ms": plain_ms,
        "kernel_gradient_ms": kernel_gradient_ms,
        "plain_gradient_ms": plain_gradient_ms,
        "error": _largest_error(actual, exact),
        "plain_error": _largest_error(plain_actual, exact),
    }


def attention_row(setting: Setting, kernel: Kernel, name: str) -> TableRow:
    """Compares an attention kernel with `reference`."""
    B, T, H, G, K = (1, 256, 4, 2, 64) if setting.is_small else (2, 2048, 16, 8, 128)
    spec, dtype = ATTENTION_SPECS[name], "bfloat16"
    ids = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) * 3 // T, (B, T))  # three documents in a row
    segments = (ids, ids) if name == "documents" else None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.dot_product_attention(
            q, k, v, spec, platform=setting.platform, segments=segments, kernel=kernel
        )

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.reference(q, k, v, spec, segments)

    return compare(setting, attend, plain, random_arrays((B, T, H, K), (B, T, G, K), (B, T, G, K), dtype=dtype))


def gated_delta_row(setting: Setting) -> TableRow:
    """Compares the gated delta rule in chunks with its recurrence, token by token."""
    B, T, H, K = (1, 128, 2, 16) if setting.is_small else (1, 1024, 8, 128)
    q, k, v, g, beta = random_arrays(*[(B, T, H, K)] * 3, *[(B, T, H)] * 2, dtype="float32")
    q, k, g, beta = *map(gated_delta.l2_normalize, (q, k)), -jax.nn.softplus(g), jax.nn.sigmoid(beta)

    def recurrence(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array) -> jax.Array:
        def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            q, k, v, g, beta = token
            state = jnp.exp(g)[..., None, None] * state
            change = beta[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, state, precision="highest"))
            state = state + k[..., None] * change[..., None, :]
            return state, jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

        tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta))
        return jnp.moveaxis(jax.lax.scan(step, jnp.zeros((B, H, K, K)), tokens)[1], 0, 1)

    rule = _per_device(lambda *x: gated_delta.gated_delta_rule(*x)[0])
    return compare(setting, rule, recurrence, (q, k, v, g, beta))


def grouped_row(setting: Setting) -> TableRow:
    """Compares the matmul of experts with one matmul of all rows for each expert."""
    M, K, N, E = (256, 32, 64, 4) if setting.is_small else (8192, 1024, 2048, 8)
    sizes = np.array([M // E + (M // E // 2) * (-1) ** e for e in range(E)], np.int32)  # uneven
    group = np.repeat(np.arange(E), sizes)[:, None]

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return sum((jnp.where(group == e, x, 0) @ w[e] for e in range(E)), jnp.zeros((), x.dtype))

    arrays = random_arrays((M, K), (E, K, N), dtype="bfloat16")
    multiply = _per_device(lambda x, w: grouped_dot(x, w, jnp.asarray(sizes), platform=setting.platform))
    return compare(setting, multiply, plain, arrays)


def cross_entropy_row(setting: Setting) -> TableRow:
    """Compares the fused head and loss with log-softmax of all logits."""
    B, T, D, V = (1, 64, 32, 128) if setting.is_small else (2, 2048, 1024, 32768)
    x, w = random_arrays((B, T, D), (D, V), dtype="bfloat16")
    w, config = w / D**0.5, CrossEntropyConfig(num_chunks=4)
    targets = jax.random.randint(jax.random.key(2), (B, T), 0, V)
    weights = jnp.ones((B, T), jnp.float32)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        logits = jnp.einsum("btd,dv->btv", x, w).astype(jnp.float32)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))

    return compare(setting, lambda x, w: fused_cross_entropy(x, w, targets, weights, config)[0], plain, (x, w))


def quantized_row(setting: Setting, quantize: Quantize) -> TableRow:
    """Compares a quantized matmul with one in bfloat16; its error is that of the format."""
    if find_spec("qwix") is None:
        raise NotMeasuredError("it needs the package qwix, which is not installed")
    size = 128 if setting.is_small else 4096
    dims = (((1,), (0,)), ((), ()))

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return quantized.dot_general(x, quantized.quantize_array(w, (0,), quantize), dims, PartitionSpec())

    arrays = random_arrays((size, size), (size, size), dtype="bfloat16")
    return compare(setting, multiply, jnp.matmul, arrays, gradients=False)


def _on_one_device(row: Callable[[], TableRow]) -> TableRow:
    """Measures a row on a mesh of one device, whose axes some kernels ask for."""
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])):
        return row()


def cases(setting: Setting) -> Iterator[Case]:
    """Yields the kernels, attention first."""
    for title, row in _rows(setting):
        yield Case(title, partial(_on_one_device, row))


def _rows(setting: Setting) -> Iterator[tuple[str, Callable[[], TableRow]]]:
    """Yields the platform's own attention kernel first, and the attention that is the same everywhere last."""
    kernels = attention.FASTEST_FIRST[setting.platform]
    yield from _attention_rows(setting, kernels[0])
    yield "matmul of experts", partial(grouped_row, setting)
    yield "head and cross-entropy", partial(cross_entropy_row, setting)
    yield "gated delta rule", partial(gated_delta_row, setting)
    for quantize in quantized.FORMATS:
        yield f"matmul in {quantize}", partial(quantized_row, setting, quantize)
    for kernel in kernels[1:]:
        if kernel != "reference":
            yield from _attention_rows(setting, kernel)


def _attention_rows(setting: Setting, kernel: Kernel) -> Iterator[tuple[str, Callable[[], TableRow]]]:
    for name in ATTENTION_SPECS:
        yield f"attention, {kernel}, {name}", partial(attention_row, setting, kernel, name)


PART = Part(COLUMNS, 120, cases)
