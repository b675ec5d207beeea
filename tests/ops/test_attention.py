"""Every kernel agrees with the reference or is not used; the reference agrees with the definition."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.ops.attention import (
    KERNELS,
    AttentionSpec,
    Kernel,
    KernelInputs,
    choose_kernel,
    dot_product_attention,
    reference,
    splash_block,
)
from jaxinfra.parallel.mesh import abstract_mesh, make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from tests.ops.numpy_attention import attention
from tests.refusals import raises

CAUSAL, CAPPED = AttentionSpec(), AttentionSpec(softcap=1.0)
SPECS = {
    "causal": CAUSAL,
    "bidirectional": AttentionSpec(causal=False),
    "causal window": AttentionSpec(window=5),
    "window of one": AttentionSpec(window=1),
    "window, bidirectional": AttentionSpec(causal=False, window=5),
    "scale": AttentionSpec(scale=0.5),
    "soft cap": AttentionSpec(softcap=0.7),
    "soft cap, window, scale": AttentionSpec(softcap=0.7, window=3, scale=0.9),
}
INPUTS = KernelInputs(
    q_len=256, kv_len=256, head_dim=64, value_dim=64, explicit_positions=False, dtype=jnp.dtype("bfloat16")
)


def arrays(B: int, T: int, H: int, G: int, K: int, V: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V or K))
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v


def documents(B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids of three documents a row, of other lengths in every row."""
    ids = np.stack([np.searchsorted([T // 4 + 3 * b, T // 2 + b], np.arange(T), side="right") for b in range(B)])
    return ids.astype(np.int32), ids.astype(np.int32)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Checks the largest difference, relative to the largest value."""
    assert np.abs(np.asarray(actual) - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_reference_agrees_with_the_definition(spec: AttentionSpec, packed: bool) -> None:
    q, k, v = arrays(2, 16, 4, 2, 8)
    segments = documents(2, 16) if packed else None
    assert_close(reference(q, k, v, spec, segments), attention(q, k, v, spec, segments), 2e-6)


@pytest.mark.parametrize(("kv_heads", "value_dim"), [(2, 12), (4, 8), (1, 8)])
def test_reference_takes_any_kv_heads_and_value_dim(kv_heads: int, value_dim: int) -> None:
    q, k, v = arrays(2, 16, 4, kv_heads, 8, value_dim)
    assert_close(reference(q, k, v, CAUSAL), attention(q, k, v, CAUSAL), 2e-6)


def test_reference_takes_explicit_positions() -> None:
    """As in decoding: three queries from position 6 on, and a cache of 16 slots."""
    q, k, v = arrays(2, 16, 4, 2, 8)
    positions = np.tile(6 + np.arange(3), (2, 1)), np.tile(np.arange(16), (2, 1))
    for spec in (CAUSAL, AttentionSpec(window=4), CAPPED):
        actual = reference(q[:, :3], k, v, spec, positions=positions)
        assert_close(actual, attention(q[:, :3], k, v, spec, positions=positions), 2e-6)


def test_reference_keeps_scores_in_float32() -> None:
    """From bfloat16 inputs only the weights and the result are rounded: 2 roundings of 2**-9."""
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays(2, 16, 4, 2, 8))
    actual = reference(q, k, v, CAUSAL)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual.astype(jnp.float32), attention(q, k, v, CAUSAL), 2 * 2**-9)


def values_and_gradients(kernel: Callable[..., jax.Array], q, k, v, spec: AttentionSpec, segments) -> list[np.ndarray]:
    """Returns the output, and the gradients of its product with fixed noise by q, k and v."""
    noise = np.random.default_rng(1).normal(size=(*q.shape[:-1], v.shape[-1])).astype(np.float32)

    def loss(q, k, v):
        y = kernel(q, k, v, spec, segments)
        return jnp.sum(y * noise), y

    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(a) for a in (y, *grads)]


def assert_agrees(
    kernel: Callable[..., jax.Array], size: tuple[int, ...], spec: AttentionSpec, packed: bool, tolerance: float
) -> None:
    segments = documents(*size[:2]) if packed else None
    actual, expected = (values_and_gradients(f, *arrays(*size), spec, segments) for f in (kernel, reference))
    for name, a, b in zip("yqkv", actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("spec", [spec for spec in SPECS.values() if spec.softcap is None])
def test_xla_and_its_gradients_agree_with_the_reference(spec: AttentionSpec, packed: bool) -> None:
    assert_agrees(KERNELS["xla"].attend, (2, 16, 4, 2, 8), spec, packed, 5e-6)


SPLASH = {
    "causal": (CAUSAL, (1, 128, 2, 1, 64), False),
    "documents": (CAUSAL, (2, 128, 2, 2, 64), True),
    "bidirectional": (AttentionSpec(causal=False), (1, 128, 2, 1, 64), False),
    "window, soft cap": (AttentionSpec(window=40, softcap=0.7, scale=0.2), (1, 256, 2, 1, 64), False),
    "window, bidirectional": (AttentionSpec(causal=False, window=40), (1, 128, 1, 1, 64), True),
    "head_dim of 128": (CAUSAL, (1, 128, 2, 2, 128), False),
    "another value_dim": (CAUSAL, (1, 128, 2, 1, 192, 128), True),
}


@pytest.mark.parametrize("case", SPLASH)
def test_splash_and_its_gradients_agree_with_the_reference(case: str) -> None:
    spec, size, packed = SPLASH[case]
    assert_agrees(partial(KERNELS["splash"].attend, interpret=True), size, spec, packed, 2e-5)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_splash_lowers_for_tpu_on_a_mesh(head_dim: int, value_dim: int) -> None:
    """With documents, grouped keys and gradients, batch and heads sharded; no device is needed."""
    mesh = abstract_mesh(MeshConfig(fsdp=2, tensor=2))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor", None))
    q, k, v = (
        jax.ShapeDtypeStruct((4, 256, heads, dim), jnp.bfloat16, sharding=sharding)
        for heads, dim in ((8, head_dim), (2, head_dim), (2, value_dim))
    )
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", None)))

    def loss(q, k, v, ids):
        spec = AttentionSpec(window=100, softcap=50.0)
        y = dot_product_attention(q, k, v, spec, platform="tpu", segments=(ids, ids), kernel="splash")
        return jnp.sum(y.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v, ids)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3


def test_splash_blocks_divide_the_length() -> None:
    assert [splash_block(n) for n in (128, 384, 640, 1024, 8192, 8320)] == [128, 384, 128, 512, 512, 128]
    assert splash_block(100) == 0


NO_SOFTCAP = (CAPPED, {}, "cap")
NO_POSITIONS = (CAUSAL, {"explicit_positions": True}, "positions")
LIMITS = {
    "xla": [NO_SOFTCAP, NO_POSITIONS, (CAUSAL, {"value_dim": 32}, "32 64")],
    "cudnn": [
        NO_SOFTCAP,
        NO_POSITIONS,
        (CAUSAL, {"dtype": jnp.dtype("float32")}, "bfloat16 float32"),
        (CAUSAL, {"value_dim": 32}, "32 64"),
        (CAUSAL, {"head_dim": 256, "value_dim": 256}, "8 128 256"),
        (CAUSAL, {"head_dim": 20, "value_dim": 20}, "8 20"),
        (AttentionSpec(causal=False, window=8), {}, "window causal"),
    ],
    "splash": [
        NO_POSITIONS,
        (CAUSAL, {"q_len": 200}, "128, 200 256"),
        (CAUSAL, {"kv_len": 64}, "128, 256 64"),
        (CAUSAL, {"head_dim": 80}, "64 80"),
        (CAUSAL, {"value_dim": 80}, "64 80"),
    ],
}
PLATFORM = {"reference": "cpu", "xla": "cpu", "cudnn": "gpu", "splash": "tpu"}


@pytest.mark.parametrize("kernel", LIMITS)
def test_a_kernel_is_not_used_beyond_its_limits(kernel: Kernel) -> None:
    for spec, changes, words in LIMITS[kernel]:
        inputs = replace(INPUTS, **changes)
        with raises(ConfigError, f"model.attention_kernel={kernel}: {words} use model.attention_kernel=none"):
            choose_kernel(spec, inputs, PLATFORM[kernel], kernel)
        assert choose_kernel(spec, inputs, PLATFORM[kernel]) != kernel
    assert choose_kernel(AttentionSpec(window=8), INPUTS, PLATFORM[kernel], kernel) == kernel


@pytest.mark.parametrize(
    ("platform", "spec", "inputs", "kernel"),
    [
        ("tpu", CAUSAL, INPUTS, "splash"),
        ("tpu", AttentionSpec(softcap=50.0, window=9), INPUTS, "splash"),
        ("tpu", CAUSAL, replace(INPUTS, head_dim=192, value_dim=128), "splash"),
        ("tpu", CAUSAL, replace(INPUTS, q_len=100), "xla"),
        ("tpu", CAPPED, replace(INPUTS, q_len=100), "reference"),
        ("tpu", CAUSAL, replace(INPUTS, explicit_positions=True), "reference"),
        ("gpu", CAUSAL, INPUTS, "cudnn"),
        ("gpu", AttentionSpec(window=9), INPUTS, "cudnn"),
        ("gpu", CAUSAL, replace(INPUTS, dtype=jnp.dtype("float32")), "xla"),
        ("gpu", CAPPED, INPUTS, "reference"),
        ("cpu", CAUSAL, INPUTS, "xla"),
        ("cpu", CAPPED, INPUTS, "reference"),
        ("cpu", CAUSAL, replace(INPUTS, value_dim=128), "reference"),
    ],
)
def test_the_fastest_kernel_that_can_run_is_chosen(
    platform: str, spec: AttentionSpec, inputs: KernelInputs, kernel: Kernel
) -> None:
    assert choose_kernel(spec, inputs, platform) == kernel


def test_a_kernel_of_another_platform_is_refused() -> None:
    with raises(ConfigError, "model.attention_kernel=splash: gpu use"):
        choose_kernel(CAUSAL, INPUTS, "gpu", "splash")


def test_dot_product_attention_passes_its_arguments_on() -> None:
    q, k, v = arrays(2, 16, 4, 2, 8)
    segments, spec = documents(2, 16), AttentionSpec(window=4)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        for kernel in ("reference", "xla", None):
            y = jax.jit(partial(dot_product_attention, spec=spec, platform="cpu", kernel=kernel))(
                q, k, v, segments=segments
            )
            assert_close(y, attention(q, k, v, spec, segments), 2e-6)
        with raises(ConfigError, "model.attention_kernel=xla: cap"):
            jax.jit(partial(dot_product_attention, spec=CAPPED, platform="cpu", kernel="xla"))(q, k, v)
