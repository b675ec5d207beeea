"""A small set of cases in which every pair of choices occurs, instead of all combinations.

A case chooses a run, a mesh of eight devices, a number of microbatches, the order of the devices, a context-parallel
method, a pipeline schedule and a remat policy. At least one case has:

- any two axes; an axis of 2, of 4 and of all eight devices (`python -m launch parity` covers every mesh);
- any run with any axis above 1, number of microbatches, device order and context-parallel method;
- any two of microbatches, device order, context method, schedule and remat; and each of them with any axis above 1;
- any schedule or remat policy with any kind of layers: of one type, a period of several, with experts, of images.

The cases come from a fixed sample of all valid combinations, by a greedy choice that is then improved at random. The
first ones have the most pairs for their cost, and `FAST` of them run with every test.
"""

import functools
import itertools
import math
import operator
import random
from collections.abc import Iterable
from dataclasses import replace

from jaxinfra.data.image_data import ImageData
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.remat import Remat
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.parity.meshes import all_meshes
from jaxinfra.run import Run
from tests.parity.cases import DEEP, RUNS, Case

FAST = 5
"""Cases of the cover that are not marked slow."""

DRAWS = 60
"""Sampled combinations of each mesh."""

TRIES = 600
"""Attempts to find a cheaper cover, a millisecond each."""

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
    mesh, pipeline, layers = case.mesh, case.run.pipeline, case.run.model.pipeline_periods
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
    """Estimates the time to trace and compile, fitted to measurements: the effects of these features multiply."""
    run, mesh = case.run, case.mesh
    has_images, has_experts, staged = kind(run) == "images", kind(run) == "experts", mesh.stage > 1
    schedule, in_context = run.pipeline.schedule, mesh.context > 1
    effects = (
        (has_images, 0.85),
        (not has_images and len(run.model.layers) > 1, 2.1),
        (not has_images and any(isinstance(layer.mixer, LatentAttention) for layer in run.model.layers), 1.25),
        (has_experts, 1.8),
        (has_experts and mesh.expert > 1, 1.45),
        (staged, 1.25),
        (staged and schedule == "interleaved", 1.6),
        (staged and schedule == "zero_bubble", 2.25),
        (in_context, 1.4),
        (mesh.context > 2, 1.6),
        (in_context and run.model.context_attention == "ring", 1.2),
        (mesh.tensor > 1, 1.15),
        (run.model.remat in MIXED, 1.2),
    )
    return math.prod(effect for present, effect in effects if present)


class _Search:
    """Looks for few and cheap candidates that have every pair; a set of pairs is the bits of an integer."""

    def __init__(self, cases: list[Case]) -> None:
        number = dict[tuple[str, str], int]()
        self.costs = [cost(case) for case in cases]
        self.pairs = [sum(1 << number.setdefault(pair, len(number)) for pair in sorted(pairs(case))) for case in cases]
        self.all_pairs = (1 << len(number)) - 1

    def of(self, chosen: Iterable[int]) -> int:
        """Returns the pairs that the chosen cases have."""
        return functools.reduce(operator.or_, (self.pairs[n] for n in chosen), 0)

    def cost(self, chosen: Iterable[int]) -> float:
        return sum(self.costs[n] for n in chosen)

    def completed(self, chosen: list[int], power: float) -> list[int]:
        """Adds cases, most new pairs for their cost first, until every pair is there; then leaves out what it can."""
        missing, chosen = self.all_pairs & ~self.of(chosen), list(chosen)
        useful = range(len(self.pairs))
        while missing:
            useful = [n for n in useful if self.pairs[n] & missing]
            best = max(useful, key=lambda n: (self.pairs[n] & missing).bit_count() / self.costs[n] ** power)
            chosen.append(best)
            missing &= ~self.pairs[best]
        for n in sorted(chosen, key=lambda n: -self.costs[n]):
            others = [other for other in chosen if other != n]
            if self.of(others) == self.all_pairs:
                chosen = others
        return chosen

    def improved(self, chosen: list[int]) -> list[int]:
        """Replaces a few cases at random, `TRIES` times, where that is not dearer."""
        rng = random.Random(0)
        for _ in range(TRIES):
            kept = rng.sample(chosen, len(chosen) - rng.randint(2, 8))
            found = self.completed(kept, rng.choice((0.5, 0.7, 0.9, 1.0)))
            chosen = min(found, chosen, key=self.cost)
        return chosen


@functools.cache
def cover() -> list[Case]:
    """Returns the cases, most new pairs for their cost first; each has a pair that no other case has."""
    search = _Search(candidates())
    rest, chosen = search.improved(search.completed([], 0.5)), list[int]()
    while rest:
        missing = search.all_pairs & ~search.of(chosen)
        chosen.append(max(rest, key=lambda n: (search.pairs[n] & missing).bit_count() / search.costs[n] ** 0.75))
        rest.remove(chosen[-1])
    return [candidates()[n] for n in chosen]
