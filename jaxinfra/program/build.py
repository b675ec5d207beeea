"""Builds the module of a run: its model with what the run changes in it, before there are arrays."""

from dataclasses import replace

import jax
from flax import nnx

from jaxinfra.errors import ConfigError
from jaxinfra.models.adapt import attach, pack_weights
from jaxinfra.models.module import Module
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import ParamSpec, ParamSpecs, PyTree, freeze, leaf_name, leaves_by_name, matching_paths
from jaxinfra.run import Run
from jaxinfra.user_code import user_code_errors

_ADAPTERS = {"adapter", "adapters"}


def build_module(run: Run, partitioner: Partitioner) -> Module:
    """Returns the model of a run, with adapters and packed weights if the run has some.

    Raises ConfigError if the model does not fit the partitioner, or an adapter the model.
    """
    with user_code_errors(type(run.model), "model"):
        module = run.model.in_mup(run.width_ratio).build(partitioner)
    if not isinstance(module, nnx.Module):
        raise ConfigError(f"{type(run.model).__name__}.build: returned {type(module).__name__}; return a Module")
    if run.adapter is not None:
        attach(module, run.adapter, partitioner)
    if run.precision.packed is not None:
        specs = leaves_by_name(declared_params(run, module)[0])
        pack_weights(module, run.precision.packed, lambda path: specs[path].state == "frozen", partitioner)
    return module


def declared_params(run: Run, module: nnx.Module) -> tuple[ParamSpecs, PyTree]:
    """Returns the parameters that a module declares, with those frozen that the run does not train, and their paths.

    With an adapter all others are frozen, buffers included, except for those that it names as trained.
    """
    declared: ParamSpecs = nnx.to_pure_dict(nnx.split(module)[1])
    paths = jax.tree.map_with_path(lambda path, _: leaf_name(path), declared)

    also = () if run.adapter is None else run.adapter.trained
    whole = matching_paths(jax.tree.leaves(paths), also, "adapter.trained")

    def freeze_base(spec: ParamSpec, path: str) -> ParamSpec:
        is_trained = path in whole and spec.state == "trained"
        return spec if is_trained or _ADAPTERS.intersection(path.split(".")) else replace(spec, state="frozen")

    specs = declared if run.adapter is None else jax.tree.map(freeze_base, declared, paths)
    # Modules for multi-token prediction that no loss trains stay as they are: decay would change them.
    untrained = ["mtp"] if run.model.mtp_depths and not run.mtp_depths else []
    return freeze(specs, paths, [*run.optim.frozen, *untrained]), paths


def narrow_module(run: Run, partitioner: Partitioner) -> tuple[Module, ParamSpecs] | None:
    """Returns the module of a run at the base width of muP, for no mesh, and its parameters; None if it is the same."""
    if run.width_ratio == 1:
        return None
    narrow = replace(run, model=run.model.with_width(run.optim.base_width or 1))
    module = build_module(narrow, replace(partitioner, mesh=MeshConfig(fsdp=1)))
    return module, declared_params(narrow, module)[0]
