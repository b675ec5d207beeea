"""Rules and layouts: which dimension is cut by what, and one line for what cannot be."""

import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.layout import Layout, Rules
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.parallel.spec import ParamSpec, constant

CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)


def spec(shape: tuple[int, ...], *axes: str | None) -> ParamSpec:
    return ParamSpec(shape=shape, axes=axes, init=constant(0.0), role="matrix")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            Rules(block_sequence=("fsdp",)),
            "batch=(replica, fsdp, expert), sequence=(context,), block_sequence=(fsdp,): "
            "fsdp shards two dimensions of one activation; keep fsdp in one of them",
        ),
        (
            Rules(sequence=("context", "tensor")),
            "batch=(replica, fsdp, expert), sequence=(context, tensor), block_sequence=(tensor,): "
            "tensor shards two dimensions of one activation; keep tensor in one of them",
        ),
        (
            Rules(kv_heads=()),
            "heads=(tensor,), kv_heads=(): "
            "queries and keys of one head must live on one device; give both the same mesh axes",
        ),
        (
            Rules(mlp=("fsdp",)),
            "batch=(replica, fsdp, expert), mlp=(fsdp,): "
            "fsdp shards two dimensions of one activation; keep fsdp in one of them",
        ),
        (
            Rules(vocab=("context",)),
            "sequence=(context,), vocab=(context,): "
            "context shards two dimensions of one activation; keep context in one of them",
        ),
        (
            Rules(vocab=("tensor", "stage")),
            "vocab=(tensor, stage): stages share out layers and nothing else; take stage from vocab",
        ),
        (
            Rules(embed=("fsdp", "replica")),
            "embed=(fsdp, replica): replicas have the whole model, and rows or positions of their own; "
            "take replica from embed",
        ),
        (
            Rules(experts=("tensor", "expert")),
            "experts=(tensor, expert), batch=(replica, fsdp, expert): tokens are sent to experts from the devices that "
            "share the batch; use rules.experts=(expert,)",
        ),
    ],
)
def test_rules_that_contradict_one_another_are_problems(rules: Rules, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(rules)
    assert str(raised.value) == message


def test_the_usual_rules_have_no_problem() -> None:
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
    with pytest.raises(ConfigError) as raised:
        layout.stored("blocks.mlp.up.weight", spec((2, 8, 16), "layers", "embed", "mlp"))
    assert str(raised.value) == (
        "rules.mlp, rules.embed: both put a dimension of parameter blocks.mlp.up.weight (2, 8, 16) "
        "on mesh axis tensor; take it from one of them"
    )


def test_a_dimension_that_does_not_divide_names_the_parameter() -> None:
    layout = Layout(mesh=MeshConfig(fsdp=1, tensor=4))
    with pytest.raises(ConfigError) as raised:
        layout.stored("blocks.attention.key.weight", spec((2, 8, 6, 4), "layers", "embed", "kv_heads", None))
    assert str(raised.value) == (
        "rules.kv_heads=('tensor',): parameter blocks.attention.key.weight (2, 8, 6, 4) has 6 kv_heads, "
        "which 4 shards do not divide; use another mesh or rules.kv_heads=()"
    )


def test_the_width_of_experts_leaves_their_axis_to_them() -> None:
    layout = Layout(mesh=MeshConfig(replica=2, fsdp=2, expert=2, tensor=2))
    names = ("experts", "embed", "mlp")
    assert layout.stored("w", spec((3, 8, 4, 6), "layers", *names)) == P(None, "expert", "fsdp", "tensor")
    assert layout.stored("w", spec((3, 8, 6), "layers", "embed", "mlp")) == P(None, ("fsdp", "expert"), "tensor")
    assert layout._used(names, ("batch", "sequence")) == P("expert", None, "tensor", reduced={"replica", "fsdp"})
