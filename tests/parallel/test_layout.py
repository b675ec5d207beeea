"""Rules and layouts: which dimension is cut by what, and one line for what cannot be."""

import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.layout import Layout, Rules
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.parallel.spec import ParamSpec, constant
from tests.refusals import problem, raises

CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)


def spec(shape: tuple[int, ...], *axes: str | None) -> ParamSpec:
    return ParamSpec(shape=shape, axes=axes, init=constant(0.0), role="matrix")


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (Rules(block_sequence=("fsdp",)), "batch= block_sequence=(fsdp,): fsdp"),
        (Rules(sequence=("context", "tensor")), "sequence=(context, tensor), block_sequence=(tensor,): tensor"),
        (Rules(kv_heads=()), "heads=(tensor,), kv_heads=():"),
        (Rules(mlp=("fsdp",)), "batch= mlp=(fsdp,): fsdp"),
        (Rules(vocab=("context",)), "sequence=(context,), vocab=(context,): context"),
        (Rules(vocab=("tensor", "stage")), "vocab=(tensor, stage): stage"),
        (Rules(embed=("fsdp", "replica")), "embed=(fsdp, replica): replica"),
        (Rules(experts=("tensor", "expert")), "experts=(tensor, expert), batch= use rules.experts=(expert,)"),
    ],
)
def test_rules_that_contradict_one_another_are_problems(rules: Rules, named: str) -> None:
    problem(rules, named)
    validate(Rules())


def test_axes_of_one_device_never_show() -> None:
    def specs(mesh: MeshConfig) -> tuple[P, P]:
        layout = Layout(mesh=mesh)
        return layout.spec("batch", "positions", None), layout.spec("layers", "embed", "mlp")

    assert specs(CUBE) == (P(("replica", "fsdp"), "tensor", None), P(None, "fsdp", "tensor"))
    assert specs(MeshConfig(fsdp=8)) == (P("fsdp", None, None), P(None, "fsdp", None))
    assert specs(MeshConfig(fsdp=1, tensor=8)) == (P(None, "tensor", None), P(None, None, "tensor"))
    assert specs(MeshConfig(fsdp=1)) == (P(None, None, None), P(None, None, None))


def test_shards_multiply() -> None:
    layout = Layout(mesh=CUBE)
    assert [layout.shards(name) for name in ("batch", "embed", "heads", "layers", None)] == [4, 2, 2, 1, 1]


def test_a_stored_parameter_is_cut_by_its_names() -> None:
    layout = Layout(mesh=CUBE)
    assert layout.stored("w", spec((3, 8, 4, 6), "layers", "embed", "heads", None)) == P(None, "fsdp", "tensor", None)
    assert layout.stored("norm", spec((7,), None)) == P(None)


def test_its_mark_keeps_gradients_partial_over_replica() -> None:
    stored = P("fsdp", "tensor")
    assert Layout(mesh=CUBE).with_reduced(stored) == stored.update(reduced=frozenset({"replica"}))
    assert Layout(mesh=MeshConfig(fsdp=8)).with_reduced(P("fsdp", None)) == P("fsdp", None)


def test_two_dimensions_on_one_mesh_axis_name_the_parameter() -> None:
    layout = Layout(rules=Rules(embed=("tensor",)), mesh=CUBE)
    with raises(ConfigError, "rules.mlp, rules.embed: blocks.mlp.up.weight (2, 8, 16) tensor;"):
        layout.stored("blocks.mlp.up.weight", spec((2, 8, 16), "layers", "embed", "mlp"))


def test_a_dimension_that_does_not_divide_names_the_parameter() -> None:
    layout = Layout(mesh=MeshConfig(fsdp=1, tensor=4))
    with raises(ConfigError, "rules.kv_heads= blocks.attention.key.weight (2, 8, 6, 4) rules.kv_heads=()"):
        layout.stored("blocks.attention.key.weight", spec((2, 8, 6, 4), "layers", "embed", "kv_heads", None))


def test_the_width_of_experts_leaves_their_axis_to_them() -> None:
    layout = Layout(mesh=MeshConfig(replica=2, fsdp=2, expert=2, tensor=2))
    names = ("experts", "embed", "mlp")
    assert layout.stored("w", spec((3, 8, 4, 6), "layers", *names)) == P(None, "expert", "fsdp", "tensor")
    assert layout.stored("w", spec((3, 8, 6), "layers", "embed", "mlp")) == P(None, ("fsdp", "expert"), "tensor")
    assert layout._used(names, ("batch", "sequence")) == P("expert", None, "tensor", reduced={"replica", "fsdp"})
