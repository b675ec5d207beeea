"""Which fields of a run make it another run: every field of every class that a run may hold is changed once."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxinfra.config import Loaded, apply, fingerprint, leaves
from jaxinfra.config.schema import allowed_words, children, choices, is_config, is_open, union_members
from jaxinfra.data.image_data import ImageData
from jaxinfra.data.labeled import LabeledData
from jaxinfra.data.mixing import MixStage
from jaxinfra.data.mixture import MixSource, Mixture
from jaxinfra.data.order import Curriculum
from jaxinfra.data.pairs import PairData
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.adapter import Lora
from jaxinfra.models.attention import Attention, AttentionTemperature
from jaxinfra.models.delta_net import GatedDeltaNet
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.remat import Named
from jaxinfra.models.transformer import Layer, MultiTokenPrediction, TransformerConfig
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.objectives.classification import Classification
from jaxinfra.objectives.dpo import DPO
from jaxinfra.objectives.kto import KTO
from jaxinfra.objectives.orpo import ORPO
from jaxinfra.ops.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.optimizers import SGD, Adafactor, Lion, Muon
from jaxinfra.optim.schedules import WSD, Constant, InverseSqrt, Linear
from jaxinfra.run import Run, with_fingerprint_name
from tests.decoders import changed

DECODER = TransformerConfig(
    vocab_size=300,
    num_layers=3,
    hidden_size=32,
    first_layers=(Layer(mixer=Attention(num_heads=4, temperature=AttentionTemperature()), mlp=MLP(dim=64)),),
    layers=(Layer(mixer=LatentAttention(num_heads=4), mlp=MixtureOfExperts(dim=32)),),
)
TEXT = Run(name="text", model=DECODER, data=TokenData(store="s", curriculum=Curriculum()))
MIXED = replace(TEXT, data=Mixture(sources=(MixSource(store="a"),), stages=(MixStage(weights=(1.0,)),)))
IMAGES = Run(
    name="images",
    model=VisionTransformerConfig(
        image_size=8, patch_size=4, num_classes=10, num_layers=2, hidden_size=32, num_heads=4, mlp_dim=64
    ),
    objective=Classification(),
    data=ImageData(store="s", image_size=8),
)
PAIRS = replace(TEXT, data=PairData(store="s"), objective=DPO(), init="runs/base")
RUNS = [
    PAIRS,
    replace(PAIRS, objective=ORPO(), init=None),
    replace(PAIRS, data=LabeledData(store="s"), objective=KTO()),
    TEXT,
    MIXED,
    IMAGES,
    *(replace(TEXT, optim=OptimConfig(optimizer=each)) for each in (Adafactor(), Lion(), SGD(), Muon())),
    *(replace(TEXT, optim=OptimConfig(schedule=each)) for each in (Constant(), Linear(), WSD(), InverseSqrt())),
    replace(TEXT, model=replace(DECODER, layers=(Layer(mixer=GatedDeltaNet(), mlp=MLP(dim=64)),))),
    replace(TEXT, adapter=Lora(), init="runs/base"),
    replace(TEXT, model=replace(DECODER, remat=Named(save=("query",)))),
    replace(TEXT, model=replace(DECODER, mtp=MultiTokenPrediction(layer=DECODER.layers[0]), learned_positions=None)),
    *(
        replace(TEXT, model=changed(DECODER, first_layers=(), rope=Rope(scaling=scaling)))
        for scaling in (LinearScaling(), Llama3Scaling(), YarnScaling(), LongRopeScaling(divisors=(1.0,)))
    ),
]
NOT_THE_NUMBERS = {
    *("name", "root", "mesh", "rules", "pipeline", "checkpoint", "track", "optim.offload", "objective.loss_chunks"),
    *("train.accumulate", "train.compile_cache", "train.compiler", "train.eval_every", "train.eval_tasks"),
    *("profile", "watchdog", "guard"),
    *("model.attention_kernel", "model.context_attention", "model.remat"),
    *("data.store", "data.version", "data.recipe", "data.prefetch_bytes", "data.threads", "data.on_damage"),
    *("data.sources.0.store", "data.sources.0.version", "data.sources.0.recipe"),
    "init",
}
"""Where and how fast a run goes, and in what order it rounds; each with what lies below it."""


def nodes(annotation: Any, value: Any, path: str = "") -> Iterator[tuple[type, str, Any, Any]]:
    """Every field of a tree: the class that has it, its path, annotation and value."""
    for name, part_annotation, part in children(annotation, value):
        below = f"{path}.{name}".lstrip(".")
        yield type(value), below, part_annotation, part
        yield from nodes(part_annotation, part, below)


def changed(run: Run, path: str, annotation: Any) -> Run | None:
    """The run with another value in a field; None where the field is a group, or its other classes need arguments."""
    for text in (*allowed_words(annotation), "1", "2", "0.25", "0.75", "x", "()", "(1.0, 2.0)", "(fsdp,)", "(full,)"):
        try:
            other = apply(run, [f"{path}={text}"])
        except ConfigError:
            continue
        if leaves(other) != leaves(run):
            return other
    return None


def test_a_field_names_another_run_if_it_changes_the_numbers() -> None:
    fields = {}
    for run in RUNS:
        for owner, path, annotation, _ in nodes(Run, run):
            fields.setdefault((owner, path.rpartition(".")[2]), (run, path, annotation))
    for run, path, annotation in fields.values():
        other = changed(run, path, annotation)
        if other is None:
            options = union_members(annotation)
            assert any(is_config(each) or is_open(each) or "tuple" in str(each) for each in options), path
            continue
        same = any(f"{path}.".startswith(f"{prefix}.") for prefix in NOT_THE_NUMBERS)
        assert (fingerprint(other) == fingerprint(run)) == same, path
        origins = {"name": "command line" if path == "name" else "file"}
        found = with_fingerprint_name(Loaded(run=other, source="x.py", origins=origins), run).run.name
        assert found == (other.name if same else f"{run.name}-{fingerprint(other)[:6]}"), path


def test_every_class_that_a_run_may_hold_is_walked() -> None:
    def classes(annotation: Any) -> Iterator[type]:
        yield from choices(annotation).values()
        for member in union_members(annotation):
            if is_config(member):
                yield member
            yield from (cls for part in getattr(member, "__args__", ()) if part is not ... for cls in classes(part))

    walked = [(annotation, value) for run in RUNS for _, _, annotation, value in nodes(Run, run)]
    possible = {cls for annotation, _ in walked for cls in classes(annotation)}
    assert possible == {type(value) for _, value in walked if is_config(type(value))}
