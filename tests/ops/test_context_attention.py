"""Context-parallel attention agrees with attention on one device: both methods, all masks, JAX and TPU kernels."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.ops.attention import AttentionSpec, reference
from jaxinfra.ops.block_attention import BlockAttention
from jaxinfra.ops.context_attention import context_parallel_attention
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.ops.splash_blocks import SPLASH_BLOCKS_INTERPRETED
from jaxinfra.parallel.context import SequenceSharding
from jaxinfra.parallel.mesh import abstract_mesh, make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from tests.ops.test_attention import values_and_gradients
from tests.refusals import raises

TOLERANCE = 2e-6
"""Relative to the largest value. Other orders of the same float32 sums differ by 5e-7 here."""


@dataclass(frozen=True, kw_only=True)
class Case:
    spec: AttentionSpec = AttentionSpec()
    method: ContextMethod = "ring"
    mesh: MeshConfig = MeshConfig(fsdp=1, context=4)
    zigzag: bool = True
    packed: bool = True
    batch: int = 2
    seq_len: int = 32
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    implementation: BlockAttention | None = None

    @property
    def sharding(self) -> SequenceSharding:
        return SequenceSharding(axes=("context",), num_shards=self.mesh.context, zigzag=self.zigzag)

    def arrays(self) -> tuple[np.ndarray, ...]:
        rng, kv_heads = np.random.default_rng(0), self.num_kv_heads
        heads = ((self.num_heads, self.head_dim), (kv_heads, self.head_dim), (kv_heads, self.value_dim))
        return tuple(rng.normal(size=(self.batch, self.seq_len, *head)).astype(np.float32) for head in heads)

    def ids(self) -> np.ndarray | None:
        """Returns three documents a row; their borders are inside shards and blocks, and one spans several shards."""
        if not self.packed:
            return None
        ends = np.array([self.seq_len // 5, self.seq_len - self.seq_len // 3])[None] + np.arange(self.batch)[:, None]
        return (np.arange(self.seq_len)[None, :, None] >= ends[:, None]).sum(-1).astype(np.int32)


def sharded_values_and_gradients(case: Case) -> list[np.ndarray]:
    """Returns the output, and the gradients of its product with fixed noise, in the order of positions."""
    mesh = make_mesh(case.mesh, jax.devices()[: int(np.prod(case.mesh.sizes))])
    axes = tuple(axis if getattr(case.mesh, axis) > 1 else None for axis in ("fsdp", "context", "tensor"))

    def put(x: np.ndarray, *parts: str | None) -> jax.Array:
        return jax.device_put(
            case.sharding.to_shard_order(jnp.asarray(x), 1), NamedSharding(mesh, PartitionSpec(*parts))
        )

    with jax.set_mesh(mesh):
        q, k, v = (put(x, *axes, None) for x in case.arrays())
        shape = (*q.shape[:-1], case.value_dim)
        noise = put(np.random.default_rng(1).normal(size=shape).astype(np.float32), *axes, None)

        def loss(q, k, v, noise, ids):
            options = {"platform": "cpu", "ids_BT": ids, "method": case.method, "implementation": case.implementation}
            y = context_parallel_attention(q, k, v, case.spec, sharding=case.sharding, **options)
            return jnp.sum(y * noise), y

        ids = case.ids()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        grads, y = compiled(q, k, v, noise, None if ids is None else put(ids, *axes[:2]))
        return [np.asarray(case.sharding.to_natural_order(jnp.asarray(np.asarray(a)), 1)) for a in (y, *grads)]


def check(case: Case) -> None:
    ids = case.ids()
    segments = None if ids is None else (ids, ids)
    expected = values_and_gradients(reference, *case.arrays(), case.spec, segments)
    for name, a, b in zip("yqkv", sharded_values_and_gradients(case), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max(), rtol=0, err_msg=name)


SPECS = {
    "causal": AttentionSpec(),
    "window inside a block": AttentionSpec(window=3),
    "window of some blocks, soft cap": AttentionSpec(window=14, softcap=0.7, scale=0.9),
    "bidirectional": AttentionSpec(causal=False),
    "window, bidirectional": AttentionSpec(causal=False, window=5),
}


@pytest.mark.parametrize("method", ["ring", "gather"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_sharded_attention_agrees_with_the_reference(spec: AttentionSpec, method: ContextMethod) -> None:
    check(Case(spec=spec, method=method))


CHANGES = {
    "two shards": {"mesh": MeshConfig(fsdp=1, context=2)},
    "eight shards": {"mesh": MeshConfig(fsdp=1, context=8)},
    "batch and heads sharded": {"mesh": MeshConfig(fsdp=2, context=2, tensor=2)},
    "one document": {"packed": False},
    "consecutive": {"zigzag": False},
    "multi-head": {"num_kv_heads": 4},
    "multi-query": {"num_kv_heads": 1},
    "another value_dim": {"value_dim": 12},
}


@pytest.mark.parametrize("method", ["ring", "gather"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_other_meshes_and_heads(changes: dict[str, Any], method: ContextMethod) -> None:
    check(Case(method=method, **changes))


def test_keys_pass_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of 4 keys in blocks of 8 and sequences of 64, the mask hides most chunks from most queries."""
    monkeypatch.setattr("jaxinfra.ops.block_attention.KEY_CHUNK", 4)
    for method in ("ring", "gather"):
        check(Case(method=method, seq_len=64, spec=AttentionSpec(window=9)))


def splash_case(**changes: Any) -> Case:
    sizes = {"batch": 1, "seq_len": 512, "head_dim": 64, "value_dim": 64, "mesh": MeshConfig(fsdp=1, context=2)}
    return Case(**{**sizes, "implementation": SPLASH_BLOCKS_INTERPRETED, **changes})


SPLASH = {
    "ring": splash_case(batch=2),
    "gather": splash_case(method="gather"),
    "another value_dim": splash_case(head_dim=128),
    "window, soft cap": splash_case(spec=AttentionSpec(window=300, softcap=0.7)),
    "bidirectional": splash_case(seq_len=256, spec=AttentionSpec(causal=False), zigzag=False),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.jax_range] * (name == "gather")) for name, case in SPLASH.items()],
)
def test_splash_kernels_agree_with_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.jax_range
@pytest.mark.parametrize(("method", "kernels"), [("ring", 18), ("gather", 6)])
def test_splash_kernels_lower_for_tpu(method: ContextMethod, kernels: int) -> None:
    """Forward, dkv and dq, for each visible pair of blocks of the ring's two steps, or for each block of queries."""
    mesh = abstract_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    named = NamedSharding(mesh, PartitionSpec("fsdp", "context", "tensor", None))
    q, k = (jax.ShapeDtypeStruct((4, 1024, heads, 128), jnp.bfloat16, sharding=named) for heads in (8, 2))
    ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "context")))
    sharding = SequenceSharding(axes=("context",), num_shards=2, zigzag=True)

    def loss(q, k, v, ids):
        y = context_parallel_attention(
            q, k, v, AttentionSpec(), sharding=sharding, platform="tpu", ids_BT=ids, method=method
        )
        return jnp.sum(y.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, ids)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels


@pytest.mark.parametrize(
    ("platform", "kernel", "words"),
    [("gpu", "cudnn", "sequences mesh.context"), ("cpu", "splash", "cpu"), ("tpu", "splash", "128, 64")],
)
def test_a_kernel_that_cannot_run_on_shards_is_refused(platform: str, kernel: Any, words: str) -> None:
    mesh = abstract_mesh(MeshConfig(fsdp=1, context=2))
    named = NamedSharding(mesh, PartitionSpec(None, "context", None, None))
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16, sharding=named)
    sharding = SequenceSharding(axes=("context",), num_shards=2, zigzag=True)

    def attention(q):
        return context_parallel_attention(
            q, q, q, AttentionSpec(), sharding=sharding, platform=platform, kernel=kernel, method="ring"
        )

    with jax.sharding.use_abstract_mesh(mesh), raises(ConfigError, f"={kernel}: {words} use"):
        jax.eval_shape(attention, q)
