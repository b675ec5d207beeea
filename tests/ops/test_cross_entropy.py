"""The chunked loss and its gradients agree with the formula, on one device and on meshes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.ops.cross_entropy import CrossEntropyConfig, fused_cross_entropy, token_losses
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.parallel.sharding import Partitioner

B, T, D, V = 8, 8, 16, 32
FULL = CrossEntropyConfig(z_loss=0.1, softcap=1.5)
MESHES = {
    "one": MeshConfig(fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(fsdp=1, tensor=4),
    "cube": MeshConfig(replica=2, fsdp=2, tensor=2),
}


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    w = (rng.normal(size=(D, V)) / np.sqrt(D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)
    return x, w, targets, weights


def by_formula(x, w, targets, weights, config: CrossEntropyConfig) -> dict[str, np.ndarray]:
    """Computes sums and gradients in float64, differentiated by hand."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    raw = x @ w
    capped = raw if config.softcap is None else config.softcap * np.tanh(raw / config.softcap)
    exp = np.exp(capped)
    log_z = np.log(exp.sum(-1))
    target = np.eye(V)[targets]
    entropy = (weights * (log_z - (capped * target).sum(-1))).sum()
    z_loss = (weights * config.z_loss * log_z**2).sum()
    by_log_z = 1 + 2 * config.z_loss * log_z
    by_capped = weights[..., None] * (by_log_z[..., None] * exp / exp.sum(-1, keepdims=True) - target)
    by_raw = by_capped if config.softcap is None else by_capped * (1 - (capped / config.softcap) ** 2)
    return {
        "entropy": entropy,
        "z_loss": z_loss,
        "total": entropy + z_loss,
        "x": by_raw @ w.T,
        "w": np.einsum("btd,btv->dv", x, by_raw),
    }


def computed(
    mesh: MeshConfig, config: CrossEntropyConfig, scale: float = 1.0, dtype: Any = "float32"
) -> dict[str, Any]:
    """Computes sums, and the gradients of `scale` times their total."""
    devices = make_mesh(mesh, jax.devices()[: int(np.prod(mesh.sizes))])
    partitioner = Partitioner(rules=ShardingRules(), mesh=mesh, compute_dtype=jnp.dtype(dtype))

    def loss(x, w, targets, weights):
        x = partitioner.shard(x.astype(dtype), "batch", "sequence", None, out_axis="vocab")
        total, parts = fused_cross_entropy(
            x, partitioner.gather_weight(w, ("embed", "vocab")), targets, weights, config
        )
        total, (entropy, z_loss) = jax.tree.map(lambda s: jax.reshard(s, PartitionSpec()), (total, parts))
        return scale * total, {"total": total, "entropy": entropy, "z_loss": z_loss}

    names = (("batch", "sequence", None), ("embed", "vocab"), ("batch", "sequence"), ("batch", "sequence"))
    with jax.set_mesh(devices):
        placed = [
            jax.device_put(a, NamedSharding(devices, partitioner.spec(*n)))
            for a, n in zip(inputs(), names, strict=True)
        ]
        (_, sums), (dx, dw) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*placed)
    assert dx.sharding.spec == placed[0].sharding.spec and dw.sharding.spec == placed[1].sharding.spec
    return sums | {"x": dx, "w": dw}


def check(actual: dict[str, Any], expected: dict[str, np.ndarray], scale: float, tolerance: float) -> None:
    for name, value in expected.items():
        value = value * scale if name in "xw" else value
        worst = np.abs(np.asarray(actual[name], np.float64) - value).max()
        assert worst <= tolerance * np.abs(value).max(), (name, worst)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("num_chunks", [1, 2, 8])
def test_sums_and_gradients_agree_with_the_formula(mesh: MeshConfig, num_chunks: int) -> None:
    """With z-loss, soft cap, weights of zero, and a scale from outside: to 3e-6 of the largest."""
    config = replace(FULL, num_chunks=num_chunks)
    check(computed(mesh, config, scale=0.3), by_formula(*inputs(), config), 0.3, 3e-6)


@pytest.mark.parametrize("config", [CrossEntropyConfig(num_chunks=4), CrossEntropyConfig(num_chunks=4, z_loss=0.1)])
def test_z_loss_and_softcap_are_optional(config: CrossEntropyConfig) -> None:
    check(computed(MESHES["one"], config), by_formula(*inputs(), config), 1.0, 3e-6)


@pytest.mark.parametrize("mesh", [MESHES["one"], MESHES["cube"]], ids=["one", "cube"])
@pytest.mark.parametrize("num_chunks", [1, 4])
def test_bfloat16_inputs_change_results_by_their_rounding(mesh: MeshConfig, num_chunks: int) -> None:
    """Logits and gradients are rounded to 2**-9; the sums over tokens stay float32."""
    config = replace(FULL, num_chunks=num_chunks)
    x, w, *rest = inputs()
    x, w = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w))
    expected = by_formula(x, w, *rest, config)
    actual = computed(mesh, config, dtype="bfloat16")
    check({k: actual[k] for k in ("total", "entropy")}, {k: expected[k] for k in ("total", "entropy")}, 1.0, 1e-3)
    check({k: actual[k] for k in "xw"}, {k: expected[k] for k in "xw"}, 1.0, 4 * 2**-9)


def test_large_logits_do_not_overflow() -> None:
    logits = jnp.asarray([[[1e4, 0.0, -1e4]]])
    for target, loss in ((0, 0.0), (1, 1e4), (2, 2e4)):
        assert token_losses(logits, jnp.full((1, 1), target), CrossEntropyConfig())[0] == loss
