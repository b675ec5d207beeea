"""Changes a module for a run that trains a part of it: attaches adapters, and packs weights that are not trained.

A module is changed after it was built, before it has arrays. All `Linear`s and `MoE`s of any model can be changed.
"""

import fnmatch
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from flax import nnx

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError
from jaxinfra.models.adapter import Lora
from jaxinfra.models.layers import Linear, ParamFactory
from jaxinfra.models.low_rank import LowRank
from jaxinfra.models.moe import MoE
from jaxinfra.ops.mtp import of_mtp
from jaxinfra.ops.packed import packed_shapes
from jaxinfra.parallel.rules import Packed
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import ParamSpec, constant

_EXPERT_WEIGHTS = ("gate", "up", "down")


@dataclass(frozen=True)
class _Weight:
    """A weight of a matmul: its path without ".weight", where it is, and its declaration."""

    path: str
    module: Linear | MoE
    name: str
    spec: ParamSpec


def _weights(module: nnx.Module) -> Iterator[_Weight]:
    for parts, each in nnx.iter_modules(module):
        path = ".".join(map(str, parts))
        if isinstance(each, Linear):
            yield _Weight(path, each, "weight", each.weight.get_value())
        elif isinstance(each, MoE):
            for name in _EXPERT_WEIGHTS:
                if (param := getattr(each, name)) is not None:
                    yield _Weight(f"{path}.{name}", each, name, param.get_value())


def attach(module: nnx.Module, config: Lora, partitioner: Partitioner) -> None:
    """Attaches adapters to the weights that the config names.

    Raises ConfigError if a target fits no weight, or a rank is above a dimension of one.
    """
    # Modules for multi-token prediction are not trained beside adapters.
    weights = sorted((each for each in _weights(module) if not of_mtp(each.path)), key=lambda each: each.path)
    if not weights:
        raise ConfigError("adapter: the model has no layers of jaxinfra to attach matrices to; use adapter=none")
    parts = sorted({part for each in weights for part in each.path.split(".")})
    for target in config.targets:
        if not any(_fits(each.path, target) for each in weights):
            near = nearest(target, parts)
            hint = f"; the nearest one is {near}" if near else ""
            raise ConfigError(f"adapter.targets={target}: fits no weight of the model{hint}; use {', '.join(parts)}")
    for each in weights:
        if not any(_fits(each.path, target) for target in config.targets):
            continue
        first, last = each.spec.in_dims[0], each.spec.out_dims[0]
        smaller = min(math.prod(each.spec.shape[first:last]), math.prod(each.spec.shape[last:]))
        if config.rank > smaller and not config.any_rank:
            message = f"adapter.rank={config.rank}: is above {smaller}, the smaller dimension of {each.path}"
            raise ConfigError(f"{message}; use adapter.rank={smaller} or less")
        is_expert = isinstance(each.module, MoE)
        if is_expert and config.dora:
            raise ConfigError(f"adapter.dora=true: experts have no magnitudes ({each.path}); use adapter.dora=false")
        layers = each.spec.shape[0] if each.spec.axes[0] == "layers" else 0
        adapter = LowRank(each.spec, config, ParamFactory(partitioner=partitioner, num_layers=layers))
        if isinstance(each.module, MoE):
            each.module.adapters[each.name] = adapter
        else:
            each.module.adapter = nnx.data(adapter)


def _fits(path: str, target: str) -> bool:
    return target in path.split(".") or fnmatch.fnmatchcase(path, target) or fnmatch.fnmatchcase(path, f"{target}.*")


def adapter_path(path: str) -> str:
    """Returns the path before those of the parameters of a weight's adapter, if it has one."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.adapter" if name == "weight" else f"{parent}.adapters.{name}"


def adapted_path(name: str) -> str:
    """Returns the path of the weight, without ".weight", that has a parameter of an adapter."""
    parent, _, rest = name.partition(".adapter")
    return parent + rest.removeprefix("s").rpartition(".")[0]


def packed_paths(path: str) -> tuple[str, str]:
    """Returns the paths of codes and scales of a weight, if it is packed."""
    parent, _, name = path.rpartition(".")
    return path, f"{parent}.scale" if name == "weight" else f"{parent}.scales.{name}"


def pack_weights(
    module: nnx.Module, packed: Packed, is_frozen: Callable[[str], bool], partitioner: Partitioner
) -> None:
    """Declares frozen weights as codes and scales (see `ops.packed`); `is_frozen` takes the path of a parameter."""
    for each in _weights(module):
        if not is_frozen(f"{each.path}.weight" if isinstance(each.module, Linear) else each.path):
            continue
        codes, scales = packed_shapes(each.spec.shape, each.spec.in_dims, packed)
        dtype = "int8" if packed == "int8" else "uint8"
        spec = replace(each.spec, shape=tuple(codes), dtype=dtype, init=constant(0))
        # A dimension whose scales do not divide by its shards is whole on each device; it is gathered before use.
        axes = tuple(
            None if size == 1 or (name == "embed" and size % partitioner.stored.num_shards(name)) else name
            for size, name in zip(scales, each.spec.axes, strict=True)
        )
        scale = nnx.Param(replace(spec, shape=tuple(scales), axes=axes, dtype="float32"))
        setattr(each.module, each.name, nnx.Param(spec))
        if isinstance(each.module, MoE):
            each.module.scales[each.name] = scale
        else:
            each.module.scale = nnx.data(scale)
