"""Shardings that follow from rules and mesh, and the errors for those that cannot work."""

import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import ParamSpec, constant
from tests.refusals import problem, raises

CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)


def spec(shape: tuple[int, ...], *axes: str | None) -> ParamSpec:
    return ParamSpec(shape=shape, axes=axes, init=constant(0.0), role="matrix")


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (ShardingRules(block_sequence=("fsdp",)), "batch= block_sequence=(fsdp,): fsdp"),
        (ShardingRules(sequence=("context", "tensor")), "sequence=(context, tensor), block_sequence=(tensor,): tensor"),
        (ShardingRules(kv_heads=()), "heads=(tensor,), kv_heads=():"),
        (ShardingRules(mlp=("fsdp",)), "batch= mlp=(fsdp,): fsdp"),
        (ShardingRules(vocab=("context",)), "sequence=(context,), vocab=(context,): context"),
        (ShardingRules(vocab=("tensor", "stage")), "vocab=(tensor, stage): stage"),
        (ShardingRules(embed=("fsdp", "replica")), "embed=(fsdp, replica): replica"),
        (ShardingRules(experts=("tensor", "expert")), "experts=(tensor, expert), batch= use rules.experts=(expert,)"),
    ],
)
def test_contradictory_rules_are_problems(rules: ShardingRules, named: str) -> None:
    problem(rules, named)
    validate(ShardingRules())


def test_axes_of_size_one_never_appear() -> None:
    def specs(mesh: MeshConfig) -> tuple[P, P]:
        partitioner = Partitioner(mesh=mesh)
        return partitioner.spec("batch", "positions", None), partitioner.spec("layers", "embed", "mlp")

    assert specs(CUBE) == (P(("replica", "fsdp"), "tensor", None), P(None, "fsdp", "tensor"))
    assert specs(MeshConfig(fsdp=8)) == (P("fsdp", None, None), P(None, "fsdp", None))
    assert specs(MeshConfig(fsdp=1, tensor=8)) == (P(None, "tensor", None), P(None, None, "tensor"))
    assert specs(MeshConfig(fsdp=1)) == (P(None, None, None), P(None, None, None))


def test_num_shards_is_a_product() -> None:
    partitioner = Partitioner(mesh=CUBE)
    assert [partitioner.num_shards(name) for name in ("batch", "embed", "heads", "layers", None)] == [4, 2, 2, 1, 1]


def test_stored_spec_follows_logical_axes() -> None:
    partitioner = Partitioner(mesh=CUBE)
    assert partitioner.stored_spec("w", spec((3, 8, 4, 6), "layers", "embed", "heads", None)) == P(
        None, "fsdp", "tensor", None
    )
    assert partitioner.stored_spec("norm", spec((7,), None)) == P(None)


def test_with_reduced_marks_replica() -> None:
    stored = P("fsdp", "tensor")
    assert Partitioner(mesh=CUBE).with_reduced(stored) == stored.update(reduced=frozenset({"replica"}))
    assert Partitioner(mesh=MeshConfig(fsdp=8)).with_reduced(P("fsdp", None)) == P("fsdp", None)


def test_two_dimensions_on_one_mesh_axis_are_refused() -> None:
    partitioner = Partitioner(rules=ShardingRules(embed=("tensor",)), mesh=CUBE)
    with raises(ConfigError, "rules.mlp, rules.embed: axis tensor blocks.mlp.up.weight (2, 8, 16); remove tensor"):
        partitioner.stored_spec("blocks.mlp.up.weight", spec((2, 8, 16), "layers", "embed", "mlp"))


def test_an_indivisible_dimension_is_refused() -> None:
    partitioner = Partitioner(mesh=MeshConfig(fsdp=1, tensor=4))
    with raises(ConfigError, "rules.kv_heads= blocks.attention.key.weight (2, 8, 6, 4) rules.kv_heads=()"):
        partitioner.stored_spec("blocks.attention.key.weight", spec((2, 8, 6, 4), "layers", "embed", "kv_heads", None))


def test_embed_of_experts_leaves_out_the_expert_axis() -> None:
    partitioner = Partitioner(mesh=MeshConfig(replica=2, fsdp=2, expert=2, tensor=2))
    names = ("experts", "embed", "mlp")
    assert partitioner.stored_spec("w", spec((3, 8, 4, 6), "layers", *names)) == P(None, "expert", "fsdp", "tensor")
    assert partitioner.stored_spec("w", spec((3, 8, 6), "layers", "embed", "mlp")) == P(
        None, ("fsdp", "expert"), "tensor"
    )
    used = partitioner.compute_spec(names, ("batch", "sequence"))
    assert used == P("expert", None, "tensor", reduced={"replica", "fsdp"})
