"""A small set of cases in which every pair of choices occurs, instead of all combinations.

A case chooses a run, a mesh of eight devices, a number of microbatches, the order of the devices, a context-parallel
method, a pipeline schedule and a remat policy. At least one case has:

- any two axes; an axis of 2, of 4 and of all eight devices (`python -m launch parity` covers every mesh);
- any run with any axis above 1, number of microbatches, device order and context-parallel method;
- any two of microbatches, device order, context method, schedule and remat; and each of them with any axis above 1;
- any schedule or remat policy with any kind of layers: of one type, a period of several, with experts, of images.

The cover is greedy: from a fixed sample of all valid combinations it takes the case with the most new pairs for its
cost. So the first cases test the most, and `FAST` of them run with every test.
"""

import functools
import itertools
import random
from dataclasses import replace

from jaxinfra.bench.parity import all_meshes
from jaxinfra.data.image_data import ImageData
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.remat import Remat
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.run import Run
from tests.parity.cases import DEEP, RUNS, Case

FAST = 10
"""Cases of the cover that are not marked slow."""

DRAWS = 60
"""Sampled combinations of each mesh."""

ACCUMULATE = (1, 2, 4)
METHODS: tuple[ContextMethod, ...] = ("ring", "gather")
SCHEDULES = (
    PipelineConfig(schedule="1f1b"),
    PipelineConfig(schedule="gpipe"),
    PipelineConfig(schedule="zero_bubble"),
    PipelineConfig(schedule="interleaved", chunks=2),
)
MIXED: tuple[tuple[Remat, ...], ...] = (("full", "dots"),)
REMATS: tuple[Remat | tuple[Remat, ...], ...] = ("none", "full", "dots", "weights", *MIXED)


def kind(run: Run) -> str:
    """Returns the kind of the run's layers."""
    if isinstance(run.data, ImageData):
        return "images"
    if any(isinstance(layer.mlp, MixtureOfExperts) for layer in run.model.layers):
        return "experts"
    return "several" if len(run.model.layers) > 1 else "one"


def allowed(case: Case) -> bool:
    """Returns whether the run fits the mesh, in the dimensions in which these runs differ."""
    mesh, pipeline, layers = case.mesh, case.run.pipeline, case.run.model.pipeline_layers
    if mesh.context > 1 and isinstance(case.run.data, ImageData):
        return False
    if pipeline.schedule == "interleaved":
        return layers % (2 * mesh.stage) == 0 and case.accumulate % mesh.stage == 0
    return mesh.stage <= 2 or (layers % mesh.stage == 0 and mesh.fsdp > 1)


def pairs(case: Case) -> set[tuple[str, str]]:
    """Returns the pairs of choices of a case."""
    model, mesh = case.run.model, case.mesh
    sizes = {axis: size for axis, size in zip(AXES, mesh.sizes, strict=True) if size > 1}
    shared = [f"by {case.accumulate}", f"shuffled {case.shuffled}"]
    method = [f"method {model.context_attention}"] if mesh.context > 1 else []
    features = [f"remat {model.remat}", *([f"schedule {case.run.pipeline.schedule}"] if mesh.stage > 1 else [])]
    return {
        *itertools.combinations(sizes, 2),
        *((f"{axis}={size}", "some case") for axis, size in sizes.items()),
        *itertools.combinations([*shared, *method, *features], 2),
        *itertools.product([case.run.name], [*sizes, *shared, *method]),
        *itertools.product([*shared, *method, *features], sizes),
        *itertools.product([kind(case.run)], features),
    }


def _sample(mesh: MeshConfig, rng: random.Random) -> Case:
    """Samples a combination on a mesh; choices without effect there keep their defaults."""
    run = rng.choice(list(RUNS.values()) if mesh.stage <= 2 else [DEEP])
    if isinstance(run.data, ImageData):
        model = replace(run.model, remat=rng.choice([remat for remat in REMATS if isinstance(remat, str)]))
    else:
        model = replace(run.model, remat=rng.choice(REMATS), context_attention=rng.choice(METHODS))
    pipeline = rng.choice(SCHEDULES) if mesh.stage > 1 else run.pipeline
    return Case(
        run=replace(run, model=model, pipeline=pipeline),
        mesh=mesh,
        accumulate=rng.choice(ACCUMULATE),
        shuffled=rng.random() < 0.5,
    )


@functools.cache
def candidates() -> list[Case]:
    """Returns a fixed sample of all valid combinations."""
    rng = random.Random(0)
    samples = [_sample(mesh, rng) for mesh in all_meshes(8) for _ in range(DRAWS)]
    return [case for case in samples if allowed(case)]


def cost(case: Case) -> float:
    """Estimates the compile time in seconds, fitted to measurements: the effects of these features multiply."""
    model, staged = case.run.model, case.mesh.stage > 1
    has_images, has_experts = kind(case.run) == "images", kind(case.run) == "experts"
    features = [
        not has_images and len(model.layers) > 1,
        has_experts,
        staged,
        staged and case.run.pipeline.schedule == "zero_bubble",
        case.mesh.context > 1,
        model.remat in MIXED,
    ]
    return 8 + 4 ** sum(features) / 3


@functools.cache
def cover() -> list[Case]:
    """Returns the cases, most new pairs for their cost first; each has a pair that no other case has."""
    pairs_of = {case: pairs(case) for case in candidates()}
    all_pairs = set[tuple[str, str]]().union(*pairs_of.values())
    missing, chosen = set(all_pairs), list[Case]()
    while missing:
        case = max(pairs_of, key=lambda case: len(pairs_of[case] & missing) / cost(case) ** 0.75)
        chosen.append(case)
        missing -= pairs_of[case]
    for case in sorted(chosen, key=cost, reverse=True):
        others = [other for other in chosen if other != case]
        if set[tuple[str, str]]().union(*(pairs_of[other] for other in others)) == all_pairs:
            chosen = others
    return chosen
