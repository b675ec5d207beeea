"""The program that samples from a language model and scores texts with it, on all devices.

It shards parameters as training does, and rows over the axes of the batch. It has no pipeline stages, and no sharded
positions: a decoding step has one position.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jax.sharding import Mesh

from jaxinfra.config import validate
from jaxinfra.inference.language_model import require_text
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.parallel.mesh import Device, make_mesh, reshape_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.program import Program
from jaxinfra.run import GuardConfig, Run


def sampling_program(run: Run, devices: Sequence[Device] | Mesh, *, strict: bool = False) -> Program:
    """Returns the program of a language model's run on these devices, with default compiler options.

    The devices of `stage` and `context` are added to fsdp. If the mesh does not fit the devices, or the model does not
    fit the mesh, another one is chosen; with `strict` that is a ConfigError. The program is not in canonical mode, in
    which each device applies the model to its own rows alone.
    """
    require_text(run)
    count = devices.devices.size if isinstance(devices, Mesh) else len(devices)
    if strict:
        run = _planned(run, _without_stages(run.mesh).resolve(count))
    else:
        plans = [_planned(run, mesh) for mesh in _candidates(_without_stages(run.mesh), count)]
        run = next((plan for plan in plans if not [*plan.mesh_fit.problems()]), plans[0])
    validate(run)
    return Program(run, reshape_mesh(devices, run.mesh) if isinstance(devices, Mesh) else make_mesh(run.mesh, devices))


def _planned(run: Run, mesh: MeshConfig) -> Run:
    """Returns the run as it is sampled on a mesh; it has one row for each device."""
    rows = tuple(axis for axis in run.rules.sequence if axis != "context")
    rules = replace(run.rules, batch=(*run.rules.batch, *rows), sequence=("context",), block_sequence=())
    batch = math.prod(mesh.sizes)
    train = replace(run.train, compiler="default", canonical=None, accumulate=1, global_batch=batch)
    model, guard = _without_capacity(require_text(run)[0]), GuardConfig()
    return replace(run, mesh=mesh, rules=rules, train=train, guard=guard, model=model, pipeline=PipelineConfig())


def _without_capacity(model: TransformerConfig) -> TransformerConfig:
    """Lets experts serve all tokens: what a text is worth does not depend on the length that its row is padded to."""

    def change(layer: Layer) -> Layer:
        if not isinstance(layer.mlp, MixtureOfExperts):
            return layer
        return replace(layer, mlp=replace(layer.mlp, capacity_factor=None))

    return replace(model, layers=tuple(map(change, model.layers)), first_layers=tuple(map(change, model.first_layers)))


def _without_stages(mesh: MeshConfig) -> MeshConfig:
    """Moves the devices of stages and of sharded sequences to fsdp."""
    moved = (mesh.fsdp, mesh.stage, mesh.context)
    return replace(mesh, fsdp=-1 if -1 in moved else math.prod(moved), stage=1, context=1)


def _candidates(wanted: MeshConfig, devices: int) -> Iterator[MeshConfig]:
    """Yields meshes of this many devices: the wanted one, then the likest ones, with ever fewer shards."""
    fixed = math.prod(size for size in wanted.sizes if size != -1)
    if devices == fixed or (-1 in wanted.sizes and devices % fixed == 0):
        yield wanted.resolve(devices)
    for largest_tensor, largest_expert in ((wanted.tensor, wanted.expert), (1, 1)):
        tensor = math.gcd(max(1, largest_tensor), devices)
        expert = math.gcd(max(1, largest_expert), devices // tensor)
        rest = devices // (tensor * expert)
        for fsdp in range(rest, 0, -1):
            if rest % fsdp == 0:
                yield MeshConfig(replica=rest // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)
