"""Attention over shards is attention on one device: both forms, all masks, plain and by the kernels of TPUs."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.ops.attention import See, reference
from jaxinfra.ops.context import attend_across
from jaxinfra.ops.route import Form
from jaxinfra.ops.tile import SPLASH_INTERPRETED, Tiles
from jaxinfra.parallel.context import SequenceSharding
from jaxinfra.parallel.mesh import abstract_mesh, make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from tests.ops.test_attention import values_and_gradients
from tests.refusals import raises

TOLERANCE = 2e-6
"""Part of the largest value. Other orders of the same float32 sums differ by 5e-7 here."""


@dataclass(frozen=True, kw_only=True)
class Case:
    see: See = See()
    form: Form = "ring"
    mesh: MeshConfig = MeshConfig(fsdp=1, context=4)
    zigzag: bool = True
    packed: bool = True
    rows: int = 2
    length: int = 32
    heads: int = 4
    groups: int = 2
    head_dim: int = 8
    value_dim: int = 8
    tiles: Tiles | None = None

    @property
    def sharding(self) -> SequenceSharding:
        return SequenceSharding(axes=("context",), num_shards=self.mesh.context, zigzag=self.zigzag)

    def arrays(self) -> tuple[np.ndarray, ...]:
        draw = np.random.default_rng(0)
        heads = ((self.heads, self.head_dim), (self.groups, self.head_dim), (self.groups, self.value_dim))
        return tuple(draw.normal(size=(self.rows, self.length, *head)).astype(np.float32) for head in heads)

    def segments(self) -> np.ndarray | None:
        """Three documents a row; borders are inside of shards and blocks, and one document spans several."""
        cuts = np.array([self.length // 5, self.length - self.length // 3])[None] + np.arange(self.rows)[:, None]
        return (
            (np.arange(self.length)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32) if self.packed else None
        )


def across(case: Case) -> list[np.ndarray]:
    """The result and the gradients of its product with fixed noise, positions in their own order."""
    mesh = make_mesh(case.mesh, jax.devices()[: int(np.prod(case.mesh.sizes))])
    axes = tuple(axis if getattr(case.mesh, axis) > 1 else None for axis in ("fsdp", "context", "tensor"))

    def placed(x: Any, *parts: str | None) -> Any:
        arranged = None if x is None else case.sharding.to_shard_order(jnp.asarray(x), 1)
        return None if x is None else jax.device_put(arranged, NamedSharding(mesh, PartitionSpec(*parts)))

    def kernel(q, k, v, see, segments):
        return attend_across(
            q, k, v, see, sharding=case.sharding, platform="cpu", segments_BT=segments, form=case.form, tiles=case.tiles
        )

    with jax.set_mesh(mesh):
        q, k, v = (placed(x, *axes, None) for x in case.arrays())
        width = (*q.shape[:-1], case.value_dim)
        noise = placed(np.random.default_rng(1).normal(size=width).astype(np.float32), *axes, None)

        def loss(q, k, v, noise, segments):
            y = kernel(q, k, v, case.see, segments)
            return jnp.sum(y * noise), y

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        grads, y = compiled(q, k, v, noise, placed(case.segments(), *axes[:2]))
        return [np.asarray(case.sharding.to_natural_order(jnp.asarray(np.asarray(a)), 1)) for a in (y, *grads)]


def check(case: Case) -> None:
    segments = case.segments()
    both = None if segments is None else (segments, segments)
    wanted = values_and_gradients(reference, *case.arrays(), case.see, both)
    for name, one, other in zip("yqkv", across(case), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE * np.abs(other).max(), rtol=0, err_msg=name)


SEES = {
    "causal": See(),
    "window inside a block": See(window=3),
    "window of some blocks, soft cap": See(window=14, softcap=0.7, scale=0.9),
    "whole": See(causal=False),
    "window looking ahead": See(causal=False, window=5),
}


@pytest.mark.parametrize("form", ["ring", "gather"])
@pytest.mark.parametrize("see", SEES.values(), ids=SEES)
def test_attention_over_shards_is_attention(see: See, form: Form) -> None:
    check(Case(see=see, form=form))


MESHES = {
    "two shards": {"mesh": MeshConfig(fsdp=1, context=2)},
    "eight shards": {"mesh": MeshConfig(fsdp=1, context=8)},
    "rows and heads": {"mesh": MeshConfig(fsdp=2, context=2, tensor=2)},
    "one document": {"packed": False},
    "consecutive": {"zigzag": False},
    "a head of keys for each": {"groups": 4},
    "one head of keys": {"groups": 1},
    "values of another width": {"value_dim": 12},
}


@pytest.mark.parametrize("form", ["ring", "gather"])
@pytest.mark.parametrize("change", MESHES.values(), ids=MESHES)
def test_on_every_mesh(change: dict[str, Any], form: Form) -> None:
    check(Case(form=form, **change))


def test_keys_pass_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 keys, where blocks have 8 and whole sequences 64: most chunks are out of sight of most queries."""
    monkeypatch.setattr("jaxinfra.ops.tile.CHUNK", 4)
    for form in ("ring", "gather"):
        check(Case(form=form, length=64, see=See(window=9)))


def kernel_case(**changes: Any) -> Case:
    plain = {"mesh": MeshConfig(fsdp=1, context=2), "length": 512, "head_dim": 64, "value_dim": 64, "rows": 1}
    return Case(**{**plain, "tiles": SPLASH_INTERPRETED, **changes})


KERNELS = {
    "ring": kernel_case(rows=2),
    "gather": kernel_case(form="gather"),
    "values of another width": kernel_case(head_dim=128),
    "window, soft cap": kernel_case(see=See(window=300, softcap=0.7)),
    "whole": kernel_case(length=256, see=See(causal=False), zigzag=False),
}


@pytest.mark.jax_range
@pytest.mark.slow
@pytest.mark.parametrize("case", KERNELS.values(), ids=KERNELS)
def test_the_kernels_of_tpus_compute_the_same(case: Case) -> None:
    check(case)


@pytest.mark.jax_range
@pytest.mark.parametrize(("form", "kernels"), [("ring", 9), ("gather", 6)])
def test_they_lower_for_tpu(form: Form, kernels: int) -> None:
    """Forward, gradients of keys and values, and of queries: for each pair of blocks of a step, or piece of queries."""
    mesh = abstract_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    spread = NamedSharding(mesh, PartitionSpec("fsdp", "context", "tensor", None))
    q, k = (jax.ShapeDtypeStruct((4, 1024, n, 128), jnp.bfloat16, sharding=spread) for n in (8, 2))
    ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "context")))
    sharding = SequenceSharding(axes=("context",), num_shards=2, zigzag=True)

    def loss(q, k, v, ids):
        y = attend_across(q, k, v, See(), sharding=sharding, platform="tpu", segments_BT=ids, form=form)
        return jnp.sum(y.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, ids)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    steps = 2 if form == "ring" else 1
    assert text.count("tpu_custom_call") == kernels * steps


def test_a_kernel_without_a_form_for_shards_is_refused() -> None:
    mesh = abstract_mesh(MeshConfig(fsdp=1, context=2))
    spread = NamedSharding(mesh, PartitionSpec(None, "context", None, None))
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16, sharding=spread)
    sharding = SequenceSharding(axes=("context",), num_shards=2, zigzag=True)
    for platform, forced, why in (
        ("gpu", "cudnn", "sequences"),
        ("cpu", "splash", "cpu"),
        ("tpu", "splash", "128, 64"),
    ):

        def attend(q, platform=platform, forced=forced):
            return attend_across(q, q, q, See(), sharding=sharding, platform=platform, forced=forced, form="ring")

        with jax.sharding.use_abstract_mesh(mesh), raises(ConfigError, f"={forced}: {why} use"):
            jax.eval_shape(attend, q)
