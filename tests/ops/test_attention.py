"""Every kernel computes the same attention, or refuses; the reference computes that of the definition."""

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
from jaxinfra.ops.attention import KERNELS, See, Shape, attend, choose, reference, splash_block, splash_interpreted
from jaxinfra.parallel.mesh import abstract_mesh, make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from tests.ops.numpy_attention import attention
from tests.refusals import raises

SEES = {
    "causal": See(),
    "whole": See(causal=False),
    "causal window": See(window=5),
    "window of one": See(window=1),
    "window looking ahead": See(causal=False, window=5),
    "scale": See(scale=0.5),
    "soft cap": See(softcap=0.7),
    "soft cap, window, scale": See(softcap=0.7, window=3, scale=0.9),
}
SHAPE = Shape(queries=256, keys=256, head_dim=64, value_dim=64, indexed=False, dtype=jnp.dtype("bfloat16"))


def arrays(B: int, T: int, H: int, G: int, K: int, V: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V or K))
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v


def documents(B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of three documents a row, of other lengths in every row."""
    ids = np.stack([np.searchsorted([T // 4 + 3 * b, T // 2 + b], np.arange(T), side="right") for b in range(B)])
    return ids.astype(np.int32), ids.astype(np.int32)


def close(found: Any, wanted: Any, tolerance: float) -> None:
    """The difference is a small part of the largest value."""
    assert np.abs(np.asarray(found) - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("see", SEES.values(), ids=SEES)
def test_reference_is_the_definition(see: See, packed: bool) -> None:
    q, k, v = arrays(2, 16, 4, 2, 8)
    segments = documents(2, 16) if packed else None
    close(reference(q, k, v, see, segments), attention(q, k, v, see, segments), 2e-6)


def test_values_have_a_width_of_their_own() -> None:
    q, k, v = arrays(2, 16, 4, 2, 8, 12)
    close(reference(q, k, v, See()), attention(q, k, v, See()), 2e-6)


@pytest.mark.parametrize("groups", [4, 1])
def test_query_heads_share_key_heads(groups: int) -> None:
    q, k, v = arrays(2, 16, 4, groups, 8)
    close(reference(q, k, v, See()), attention(q, k, v, See()), 2e-6)


def test_reference_takes_places_of_queries_and_keys() -> None:
    """As in decoding: 3 queries from place 6 on, a cache of 16 slots, of which those ahead are not seen."""
    q, k, v = arrays(2, 16, 4, 2, 8)
    q_index, kv_index = np.tile(6 + np.arange(3), (2, 1)), np.tile(np.arange(16), (2, 1))
    for see in (See(), See(window=4), See(softcap=1.0)):
        found = reference(q[:, :3], k, v, see, q_index=q_index, kv_index=kv_index)
        close(found, attention(q[:, :3], k, v, see, q_index=q_index, kv_index=kv_index), 2e-6)


def test_reference_keeps_scores_in_float32() -> None:
    """From bfloat16 inputs only the weights and the result are rounded: 2 roundings of 2**-9."""
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays(2, 16, 4, 2, 8))
    found = reference(q, k, v, See())
    assert found.dtype == jnp.bfloat16
    close(found.astype(jnp.float32), attention(q, k, v, See()), 2 * 2**-9)


def values_and_gradients(kernel: Callable[..., jax.Array], q, k, v, see: See, segments) -> list[np.ndarray]:
    """The result, and the gradients of its product with fixed noise."""
    noise = np.random.default_rng(1).normal(size=(*q.shape[:-1], v.shape[-1])).astype(np.float32)

    def loss(q, k, v):
        y = kernel(q, k, v, see, segments)
        return jnp.sum(y * noise), y

    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(a) for a in (y, *grads)]


def agree(kernel: Callable[..., jax.Array], size: tuple[int, ...], see: See, packed: bool, tolerance: float) -> None:
    segments = documents(*size[:2]) if packed else None
    found, wanted = (values_and_gradients(f, *arrays(*size), see, segments) for f in (kernel, reference))
    for name, one, other in zip("yqkv", found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("see", [s for s in SEES.values() if s.softcap is None])
def test_xla_is_the_reference_and_so_are_its_gradients(see: See, packed: bool) -> None:
    agree(KERNELS["xla"][0], (2, 16, 4, 2, 8), see, packed, 5e-6)


SPLASH = {
    "causal": (See(), (1, 128, 2, 1, 64), False),
    "documents": (See(), (2, 128, 2, 2, 64), True),
    "whole": (See(causal=False), (1, 128, 2, 1, 64), False),
    "window, soft cap": (See(window=40, softcap=0.7, scale=0.2), (1, 256, 2, 1, 64), False),
    "window looking ahead": (See(causal=False, window=40), (1, 128, 1, 1, 64), True),
    "wide heads": (See(), (1, 128, 2, 2, 128), False),
    "values of another width": (See(), (1, 128, 2, 1, 192, 128), True),
}


@pytest.mark.parametrize("case", SPLASH)
def test_splash_is_the_reference_and_so_are_its_gradients(case: str) -> None:
    see, size, packed = SPLASH[case]
    agree(splash_interpreted, size, see, packed, 2e-5)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_splash_lowers_for_tpu_on_a_mesh(head_dim: int, value_dim: int) -> None:
    """With documents, grouped keys and gradients, batch and heads sharded; no device is needed."""
    mesh = abstract_mesh(MeshConfig(fsdp=2, tensor=2))
    spread = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor", None))
    q, k, v = (
        jax.ShapeDtypeStruct((4, 256, n, width), jnp.bfloat16, sharding=spread)
        for n, width in ((8, head_dim), (2, head_dim), (2, value_dim))
    )
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", None)))

    def loss(q, k, v, ids):
        y = attend(q, k, v, See(window=100, softcap=50.0), platform="tpu", segments=(ids, ids), forced="splash")
        return jnp.sum(y.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        text = (
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v, ids).lower(lowering_platforms=("tpu",)).as_text()
        )
    assert text.count("tpu_custom_call") == 3


def test_splash_blocks_divide_the_length() -> None:
    assert [splash_block(n) for n in (128, 384, 640, 1024, 8192, 8320)] == [128, 384, 128, 512, 512, 128]
    assert splash_block(100) == 0


NO_CAP = (See(softcap=1.0), {}, "cap")
NO_PLACES = (See(), {"indexed": True}, "positions")
REFUSALS = {
    "xla": [NO_CAP, NO_PLACES, (See(), {"value_dim": 32}, "32 64")],
    "cudnn": [
        NO_CAP,
        NO_PLACES,
        (See(), {"dtype": jnp.dtype("float32")}, "bfloat16 float32"),
        (See(), {"value_dim": 32}, "32 64"),
        (See(), {"head_dim": 256, "value_dim": 256}, "128 256"),
        (See(), {"head_dim": 20, "value_dim": 20}, "8, 20"),
        (See(causal=False, window=8), {}, "window causal"),
    ],
    "splash": [
        NO_PLACES,
        (See(), {"queries": 200}, "128, 200 256"),
        (See(), {"keys": 64}, "128, 256 64"),
        (See(), {"head_dim": 80}, "64 80"),
        (See(), {"value_dim": 80}, "64 80"),
    ],
}
PLATFORM = {"reference": "cpu", "xla": "cpu", "cudnn": "gpu", "splash": "tpu"}


@pytest.mark.parametrize("kernel", REFUSALS)
def test_kernels_refuse_by_name_what_they_cannot_honour(kernel: Any) -> None:
    for see, changes, named in REFUSALS[kernel]:
        shape = replace(SHAPE, **changes)
        with raises(ConfigError, f"model.attention={kernel}: {named} use model.attention=none"):
            choose(see, shape, PLATFORM[kernel], forced=kernel)
        assert choose(see, shape, PLATFORM[kernel]) != kernel
    assert choose(See(window=8), SHAPE, PLATFORM[kernel], forced=kernel) == kernel


@pytest.mark.parametrize(
    ("platform", "see", "shape", "chosen"),
    [
        ("tpu", See(), SHAPE, "splash"),
        ("tpu", See(softcap=50.0, window=9), SHAPE, "splash"),
        ("tpu", See(), replace(SHAPE, head_dim=192, value_dim=128), "splash"),
        ("tpu", See(), replace(SHAPE, queries=100), "xla"),
        ("tpu", See(softcap=1.0), replace(SHAPE, queries=100), "reference"),
        ("tpu", See(), replace(SHAPE, indexed=True), "reference"),
        ("gpu", See(), SHAPE, "cudnn"),
        ("gpu", See(window=9), SHAPE, "cudnn"),
        ("gpu", See(), replace(SHAPE, dtype=jnp.dtype("float32")), "xla"),
        ("gpu", See(softcap=1.0), SHAPE, "reference"),
        ("cpu", See(), SHAPE, "xla"),
        ("cpu", See(softcap=1.0), SHAPE, "reference"),
        ("cpu", See(), replace(SHAPE, value_dim=128), "reference"),
    ],
)
def test_the_fastest_kernel_that_honours_all_is_chosen(platform: str, see: See, shape: Shape, chosen: str) -> None:
    assert choose(see, shape, platform) == chosen


def test_a_kernel_is_not_forced_onto_another_platform() -> None:
    with raises(ConfigError, "model.attention=splash: gpu use"):
        choose(See(), SHAPE, "gpu", forced="splash")


def test_attend_passes_on_what_it_was_given() -> None:
    q, k, v = arrays(2, 16, 4, 2, 8)
    segments = documents(2, 16)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        for forced in ("reference", "xla", None):
            kernel = partial(attend, see=See(window=4), platform="cpu", forced=forced)
            y = jax.jit(kernel)(q, k, v, segments=segments)
            close(y, attention(q, k, v, See(window=4), segments), 2e-6)
        with raises(ConfigError, "model.attention=xla: cap"):
            jax.jit(partial(attend, see=See(softcap=1.0), platform="cpu", forced="xla"))(q, k, v)
