"""A small set of cases in which every pair of choices meets, in place of all combinations.

A case chooses a run, a mesh of eight devices, a number of microbatches, the order of the devices, how keys and values
cross a sequence, a pipeline schedule and what layers keep for the backward pass. These meet in at least one case:

- any two axes; an axis of 2, of 4 and of all eight devices (`python -m launch parity` has every mesh);
- a run and an axis that is above 1, a number of microbatches, an order, a way across a sequence;
- any two of: microbatches, order, way, schedule, remat; and each of them with each axis above 1;
- a schedule or remat and a kind of layers: of one kind, of several, with experts, of images.

The cover is greedy: of a fixed sample of all combinations that the product allows, the case that brings most pairs
which no case before it has, for what it costs. The first cases therefore say most; `FAST` of them run with every test.
"""

import functools
import itertools
import random
from dataclasses import replace

from jaxinfra.bench.parity import all_meshes
from jaxinfra.data.image_data import ImageData
from jaxinfra.models.remat import Remat
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.run import Run
from tests.parity.cases import DEEP, RUNS, Case

FAST = 10
"""Of the cover; the rest is slow."""

DRAWS = 60
"""Of all combinations of one mesh."""

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
    """What its layers are."""
    if isinstance(run.data, ImageData):
        return "images"
    if run.model.moe is not None:
        return "experts"
    return "several" if len(run.model.distinct_layer_types) > 1 else "one"


def allowed(case: Case) -> bool:
    """Whether the product allows it, by the divisions that these runs do not all meet."""
    mesh, pipeline, layers = case.mesh, case.run.pipeline, case.run.model.num_layers
    if mesh.context > 1 and isinstance(case.run.data, ImageData):
        return False
    if pipeline.schedule == "interleaved":
        return layers % (2 * mesh.stage) == 0 and case.accumulate % mesh.stage == 0
    return mesh.stage <= 2 or (layers % mesh.stage == 0 and mesh.fsdp > 1)


def pairs(case: Case) -> set[tuple[str, str]]:
    """The pairs of choices that meet in a case."""
    model, mesh = case.run.model, case.mesh
    sizes = [(axis, size) for axis, size in zip(AXES, mesh.sizes, strict=True) if size > 1]
    exact, above = [f"{axis}={size}" for axis, size in sizes], [axis for axis, _ in sizes]
    shared = [f"by {case.accumulate}", f"shuffled {case.shuffled}"]
    method = [f"method {model.context_attention}"] if mesh.context > 1 else []
    features = [f"remat {model.remat}", *([f"schedule {case.run.pipeline.schedule}"] if mesh.stage > 1 else [])]
    return {
        *itertools.combinations(above, 2),
        *itertools.product(exact, ["some case"]),
        *itertools.combinations([*shared, *method, *features], 2),
        *itertools.product([case.run.name], [*above, *shared, *method]),
        *itertools.product([*shared, *method, *features], above),
        *itertools.product([kind(case.run)], features),
    }


def _drawn(mesh: MeshConfig, draw: random.Random) -> Case:
    """Any combination on a mesh; what has no use there is left as it is."""
    run = draw.choice(list(RUNS.values()) if mesh.stage <= 2 else [DEEP])
    if isinstance(run.data, ImageData):
        model = replace(run.model, remat=draw.choice([remat for remat in REMATS if isinstance(remat, str)]))
    else:
        model = replace(run.model, remat=draw.choice(REMATS), context_attention=draw.choice(METHODS))
    pipeline = draw.choice(SCHEDULES) if mesh.stage > 1 else run.pipeline
    return Case(
        run=replace(run, model=model, pipeline=pipeline),
        mesh=mesh,
        accumulate=draw.choice(ACCUMULATE),
        shuffled=draw.random() < 0.5,
    )


@functools.cache
def candidates() -> list[Case]:
    """A sample of all combinations that the product allows, always the same."""
    draw = random.Random(0)
    drawn = (_drawn(mesh, draw) for mesh in all_meshes(8) for _ in range(DRAWS))
    return [case for case in drawn if allowed(case)]


def cost(case: Case) -> float:
    """About the seconds that a core compiles, as measured: these features multiply one another."""
    model, staged = case.run.model, case.mesh.stage > 1
    unlike = kind(case.run) == "several" or (kind(case.run) == "experts" and len(model.distinct_layer_types) > 1)
    zero_bubble = staged and case.run.pipeline.schedule == "zero_bubble"
    features = unlike, staged, zero_bubble, case.mesh.context > 1, kind(case.run) == "experts", model.remat in MIXED
    return 8 + 4 ** sum(features) / 3


@functools.cache
def cover() -> list[Case]:
    """The cases, those that bring most for their cost first; each has a pair that no other one has."""
    left = [(case, pairs(case)) for case in candidates()]
    every = set[tuple[str, str]]().union(*(found for _, found in left))
    missing, chosen = set(every), dict[Case, set[tuple[str, str]]]()
    while missing:
        case, found = max(left, key=lambda each: len(each[1] & missing) / cost(each[0]) ** 0.75)
        chosen[case] = found
        missing -= found
    for case in sorted(chosen, key=cost, reverse=True):
        if set[tuple[str, str]]().union(*(found for other, found in chosen.items() if other != case)) == every:
            del chosen[case]
    return list(chosen)
