"""Searches for the mesh, the microbatches and the remat with which a run takes the shortest step on a topology.

Every layout that may fit is ranked by a sketch of its time, and the best are compiled, which takes minutes each. A
layout is left out before it is compiled only if its state and the inputs of its layers alone exceed a device: the
memory of the sketch itself only decides what is compiled first.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import jax

from jaxinfra.config import validate
from jaxinfra.config.text import format_value
from jaxinfra.errors import ConfigError
from jaxinfra.models.remat import Named
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.plan.compile_errors import TOO_LARGE
from jaxinfra.plan.estimate import rates_of
from jaxinfra.plan.topology import Topology
from jaxinfra.program import Program
from jaxinfra.run import Run
from jaxinfra.train.statistics import per_device_bytes, step_flops

MAX_RANKED, WAVE = 30, 4
"""Layouts of which some are compiled, the most promising; and those that are compiled before results are looked at."""
_REMAT = ("none", "dots_and_attention", "dots", "full")
_RECOMPUTED = {"none": 0.0, "weights": 0.0, "dots_and_attention": 0.02, "dots": 0.06, "offload": 0.06, "full": 0.33}
"""Work that is done again, as a part of that of a step without remat."""
_ALL_KEPT = 3.0  # times what `dots` keeps: without remat, as compiled for Llama 3.1 8B on v5p
_PEAK_PART = 0.75  # of the peak that matmuls reach
_SHORT_SHARD = 2048  # positions; a sequence is not split into shorter parts
_MAX_TENSOR = 16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A run with another mesh, other microbatches, or another remat."""

    run: Run
    topology: Topology

    @property
    def overrides(self) -> tuple[str, ...]:
        """The words of a command line that make this of the config that is searched."""
        mesh = self.run.mesh
        words = [f"mesh.{axis}={getattr(mesh, axis)}" for axis in AXES]
        words.append(f"train.accumulate={self.run.train.accumulate}")
        if isinstance(policy := getattr(self.run.model, "remat", None), str):
            words.append(f"model.remat={policy}")
        return tuple(words)

    @property
    def mesh(self) -> str:
        """The mesh for people: its axes above 1."""
        return " x ".join(f"{axis} {n}" for axis, n in asdict(self.run.mesh).items() if n > 1) or "one device"

    @property
    def remat(self) -> str:
        """The remat policy for people; "-" for a model without one."""
        policy = getattr(self.run.model, "remat", "-")
        return policy if isinstance(policy, str) else format_value(policy)

    def __str__(self) -> str:
        return f"{self.mesh}, accumulate {self.run.train.accumulate}, remat {self.remat}"


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A layout with its memory and time, estimated from sizes alone."""

    layout: Layout
    least_bytes: int  # on a device: what any program of this layout holds
    likely_bytes: float
    step_s: float

    @property
    def likely_fits(self) -> bool:
        """Whether it probably fits a device."""
        return self.likely_bytes < self.layout.topology.chip.hbm_bytes

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts what is compiled first; the same for the same run."""
        return (not self.likely_fits, self.step_s, self.likely_bytes, self.layout.overrides)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The plan of a layout, as `plan --json` writes it, or the line that says why it has none."""

    layout: Layout
    plan: dict[str, Any] | None
    error: str = ""

    @property
    def step_s(self) -> float:
        """The estimated time of a step; infinite without a plan."""
        return float("inf") if self.plan is None else self.plan["estimate_s"]

    @property
    def is_too_large(self) -> bool:
        """Whether it needs more memory than a device has."""
        return TOO_LARGE in self.error


class Sketcher:
    """Sketches the layouts of one mesh, whose program and state are the same."""

    def __init__(self, run: Run, topology: Topology) -> None:
        """Raises ConfigError if the run does not fit the mesh."""
        validate(run)
        self._topology, self._chip = topology, topology.chip
        self._program = Program(run, abstract_mesh(run.mesh), "gpu" if topology.chip.platform == "cuda" else "tpu")
        if self._program.rows_per_device < 1:
            raise ConfigError(f"train.global_batch={run.train.global_batch}: fewer samples than devices")

    @property
    def rows(self) -> int:
        """Samples of a step on one device."""
        return int(self._program.rows_per_device)

    @cached_property
    def _state_bytes(self) -> int:
        leaves = jax.tree.leaves(self._program.state)
        return per_device_bytes([leaf for leaf in leaves if leaf.sharding.memory_kind != "pinned_host"])

    @cached_property
    def _flops(self) -> float:
        return step_flops(self._program) / self._program.mesh.size

    def sketch(self, run: Run) -> Sketch:
        """Sketches the run of this mesh with these microbatches and this remat."""
        mesh, accumulate = run.mesh, run.train.accumulate
        policy = getattr(run.model, "remat", "none")
        kept = policy if isinstance(policy, str) else "dots" if isinstance(policy, Named) else str(policy[0])
        seq_len = run.data.units_per_sample
        tokens = self.rows * seq_len / mesh.context / accumulate  # of a microbatch on a device
        offloads = kept == "offload" or (isinstance(policy, Named) and "layer_input" in policy.offload)
        inputs, saved = self._activation_bytes(run, tokens, kept)
        gradients = per_device_bytes(jax.tree.leaves(self._program.params))
        microbatches_in_flight = min(accumulate, mesh.stage)
        least = self._state_bytes + (0 if offloads else int(inputs / mesh.stage))
        likely = (
            self._state_bytes + gradients + (0 if kept == "offload" else saved * microbatches_in_flight / mesh.stage)
        )
        return Sketch(
            layout=Layout(run=run, topology=self._topology),
            least_bytes=least,
            likely_bytes=1.1 * likely,
            step_s=self._step_s(run, tokens, _RECOMPUTED.get(kept, 0.1)),
        )

    def _activation_bytes(self, run: Run, tokens: float, kept: str) -> tuple[float, float]:
        """Returns the bytes of the inputs of all layers, and of all that they keep, on one device."""
        model = run.model
        if not isinstance(model, TransformerConfig):
            return 0.0, 0.0
        itemsize = jax.numpy.dtype(run.precision.compute).itemsize
        per_token = itemsize / run.mesh.tensor * tokens
        inputs = len(model.training_layers) * model.hidden_size * per_token
        if kept == "full":
            return inputs, inputs
        width = 0.0
        for layer in model.training_layers:
            found = layer.mixer.attention(model.hidden_size)
            heads = found[1] if found else None
            width += 3 * model.hidden_size
            if heads is not None:
                width += heads.num_heads * (heads.head_dim + heads.value_dim)
                width += heads.num_kv_heads * (heads.head_dim + heads.value_dim)
            width += 2 * getattr(layer.mlp, "dim", 0) * getattr(layer.mlp, "top_k", 1)
        return inputs, (_ALL_KEPT if kept in ("none", "weights") else 1.0) * width * per_token

    def _step_s(self, run: Run, tokens: float, recomputed: float) -> float:
        """Returns a rough time of a step, to rank layouts: compute, and transfers that it hides in part."""
        mesh, chip, accumulate = run.mesh, self._chip, run.train.accumulate
        rates = rates_of(chip)
        link = (chip.link_bytes_per_s or chip.network_bytes_per_s or 1e11) * rates.links
        ring, all_links = 2 * link, 2 * link * max(1, sum(size > 1 for size in self._topology.shape))
        network = (chip.network_bytes_per_s or link) * rates.links
        compute = self._flops * (1 + recomputed) / (_PEAK_PART * chip.peak_flops)
        if mesh.stage > 1:
            compute *= 1 + (mesh.stage - 1) / accumulate
        shards = mesh.fsdp * mesh.expert
        weights = 2 * self._program.num_params / (mesh.tensor * mesh.stage)  # in bfloat16, of all layers of a device
        part = (shards - 1) / shards
        gathers = accumulate * weights * part * (2 + 2) / all_links  # twice, and gradients in float32 once
        replicas = mesh.replica
        links = network if self._topology.slices > 1 else ring
        sums = 2 * weights * 2 / shards * (replicas - 1) / replicas / links
        hidden, layers = getattr(run.model, "hidden_size", 0), getattr(run.model, "num_layers", 0)
        rows_bytes = 2.0 * tokens * accumulate * hidden * layers / mesh.stage
        tensor = rows_bytes * (8 + 4 * (recomputed > 0.3)) * (mesh.tensor - 1) / mesh.tensor / ring
        context = rows_bytes * 2 * (mesh.context - 1) / ring
        experts = rows_bytes * 8 * (mesh.expert - 1) / mesh.expert / ring
        return max(compute, gathers) + 0.3 * min(compute, gathers) + sums + tensor + context + experts


def layouts(run: Run, topology: Topology, fixed: Collection[str] = ()) -> list[Sketch]:
    """Returns the layouts that may fit, the most promising first; the fields at the paths `fixed` stay as they are."""
    found: list[Sketch] = []
    for mesh in meshes(run, topology):
        if any(getattr(run.mesh, axis) not in (-1, getattr(mesh, axis)) for axis in AXES if f"mesh.{axis}" in fixed):
            continue
        try:
            sketcher = Sketcher(replace(run, mesh=mesh, train=replace(run.train, accumulate=mesh.stage)), topology)
        except ConfigError:
            continue  # such as heads that do not divide
        accumulates = _accumulates(sketcher.rows, mesh, run.train.accumulate)
        if "train.accumulate" in fixed:
            accumulates = [number for number in accumulates if number == run.train.accumulate]
        for accumulate, policy in itertools.product(accumulates, _policies(run, fixed)):
            train = replace(run.train, accumulate=accumulate)
            model = replace(run.model, remat=policy) if isinstance(run.model, TransformerConfig) else run.model
            changed = replace(run, mesh=mesh, train=train, model=model)
            if _is_valid(changed):
                found.append(sketcher.sketch(changed))
    return sorted((each for each in found if each.least_bytes <= topology.chip.hbm_bytes), key=lambda each: each.order)


def _is_valid(run: Run) -> bool:
    try:
        validate(run)
    except ConfigError:
        return False
    return True


def meshes(run: Run, topology: Topology) -> Iterator[MeshConfig]:
    """Yields the meshes of all devices whose axes are sensible for a model: powers of two, and those of the config."""
    devices, slices = topology.num_devices, topology.slices
    tensors = _sizes(min(devices, _MAX_TENSOR), run.mesh.tensor)
    contexts = _sizes(min(devices, max(1, run.data.units_per_sample // _SHORT_SHARD)), run.mesh.context)
    experts = max((getattr(layer.mlp, "num_experts", 1) for layer in getattr(run.model, "layers", ())), default=1)
    for tensor, context, expert, stage in itertools.product(
        tensors, contexts, _sizes(experts, run.mesh.expert), sorted({1, run.mesh.stage})
    ):
        others = tensor * context * expert * stage
        if devices % others:
            continue
        rest = devices // others
        for fsdp in (size for size in _sizes(rest, rest) if rest % size == 0):
            mesh = MeshConfig(
                replica=rest // fsdp, stage=stage, fsdp=fsdp, expert=expert, context=context, tensor=tensor
            )
            if mesh.replica % slices == 0:  # else the network would be crossed in each layer
                yield mesh


def _sizes(largest: int, own: int) -> list[int]:
    """Returns the powers of two up to a size, and that of the config."""
    return sorted({2**power for power in range(largest.bit_length()) if 2**power <= largest} | {max(own, 1)})


def _accumulates(rows: int, mesh: MeshConfig, own: int) -> list[int]:
    """Returns the numbers of microbatches: as few as one row in each, and in a pipeline at least as many as stages."""
    return [number for number in _sizes(rows, own) if rows % number == 0 and number >= mesh.stage]


def _policies(run: Run, fixed: Collection[str]) -> list[Any]:
    if not isinstance(run.model, TransformerConfig):
        return [None]
    own = run.model.remat
    if any(path.startswith("model.remat") for path in fixed):
        return [own]
    return [*_REMAT, *([own] if own not in _REMAT else [])]


def search(
    sketches: Sequence[Sketch], compile_all: Callable[[Sequence[Layout]], list[Result]], *, limit: int
) -> list[Result]:
    """Compiles the most promising layouts, at most `limit` of them, and returns their results, the fastest first.

    `compile_all` compiles some, at the same time if it can. Results are looked at after each wave of the same size, so
    the answer depends on nothing else. If a layout needs too much memory, one of the same mesh that needs more is not
    tried.
    """
    waiting, results = list(sketches[:MAX_RANKED]), list[Result]()
    by_layout = {id(each.layout): each for each in waiting}
    while waiting and len(results) < limit:
        wave, waiting = _next_wave(waiting, min(WAVE, limit - len(results)))
        found = compile_all([each.layout for each in wave])
        results += found
        for result in found:
            if result.is_too_large:
                failed = by_layout[id(result.layout)]
                waiting = [
                    each
                    for each in waiting
                    if each.layout.run.mesh != failed.layout.run.mesh or each.likely_bytes < failed.likely_bytes
                ]
    return sorted(results, key=lambda each: (each.step_s, each.layout.overrides))


def _next_wave(waiting: Sequence[Sketch], size: int) -> tuple[list[Sketch], list[Sketch]]:
    """Takes the first sketches, at most two of a mesh, so that a wave does not fail as a whole for lack of memory."""
    wave, rest, counts = list[Sketch](), list[Sketch](), dict[MeshConfig, int]()
    for each in waiting:
        mesh = each.layout.run.mesh
        if len(wave) < size and counts.get(mesh, 0) < 2:
            counts[mesh] = counts.get(mesh, 0) + 1
            wave.append(each)
        else:
            rest.append(each)
    return (wave, rest) if wave else (list(waiting[:size]), list(waiting[size:]))
