"""Several adapters of one base as one, whose matrices stand side by side, so that a batch may use all of them.

Shape suffixes: A adapters, R their ranks together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.text import format_value
from jaxinfra.errors import ConfigError
from jaxinfra.hub.published_model import differences
from jaxinfra.inference.language_model import LanguageModel, open_language_model, require_text
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import LoadedAdapter, load_adapter, load_params, weights_digest
from jaxinfra.models.adapt import adapted_path
from jaxinfra.models.adapter import Lora
from jaxinfra.parallel.spec import Params, ParamSpec, leaves_by_name, merge_trees, nested
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.program import Program
from jaxinfra.run import Run


@dataclass(frozen=True, kw_only=True)
class _SideBySide(Lora):
    """Several adapters, whose ranks together may be above the dimensions of a weight."""

    any_rank: ClassVar[bool] = True


class AdaptedModel(NamedTuple):
    """A language model with several adapters.

    Attributes:
        model: the model.
        program: its program, with one adapter that is made of all.
        params: the parameters.
        columns: which columns of that adapter each one has, bool `[A, R]`; none, if its source is the base.
    """

    model: LanguageModel
    program: Program
    params: Params
    columns: np.ndarray


def load_adapters(
    sources: Sequence[str], overrides: Sequence[str] = (), imports: Sequence[str] | ClassFinder = ()
) -> AdaptedModel:
    """Loads a base once, and the adapters of sources: runs, folders of PEFT, or the base itself.

    The precision is that of the first source with an adapter. Raises ConfigError if sources have different bases, or
    an adapter changes more than sums of products.
    """
    peers = current_peers()
    models = [open_language_model(source, overrides, imports) for source in sources]
    runs = [model.run for model in models]
    first = next((index for index, run in enumerate(runs) if run.adapter is not None), None)
    if first is None:
        raise ConfigError(f"--adapter {sources[-1]}: has no adapter; name a run that has trained one, or a PEFT folder")
    for source, run in zip(sources, runs, strict=True):
        _check_adapter(source, run.adapter)
        if (ours := _quantized(run)) != (theirs := _quantized(runs[first])):
            raise ConfigError(
                f"{source}: has weights in {ours or 'full precision'}, {sources[first]} in "
                f"{theirs or 'full precision'}; one batch has one base: sample with each of them alone"
            )
        if differing := differences(require_text(run)[0], require_text(runs[first])[0]):
            path, one, other = differing[0].path, differing[0].left, differing[0].right
            raise ConfigError(
                f"{source}: has another base than {sources[first]} (model.{path} is {format_value(one)}, there "
                f"{format_value(other)}); name adapters of one base"
            )
    strict = any(override.startswith("mesh.") for override in overrides)
    program = sampling_program(runs[first], all_devices(), strict=strict)
    alone = [Program(replace(program.run, adapter=run.adapter), program.mesh) for run in runs]
    adapters = [load_adapter(*each, peers) for each in zip(sources, alone, strict=True)]
    own = adapters[first].base
    others = {adapter.base for adapter in adapters if adapter.weights is None} - {own}
    digests = {other: weights_digest(program, load_params(other, program, peers).params) for other in sorted(others)}
    base = load_params(own, program, peers).params  # the last one: there is memory for one base
    digests[own] = weights_digest(program, base)
    for source, adapter in zip(sources, adapters, strict=True):
        if (found := adapter.weights or digests[adapter.base]) != digests[own]:
            raise ConfigError(
                f"{source}: is for {adapter.base} with weights {found}, here {own} has weights {digests[own]}; "
                "name adapters of one base, trained with the same precision"
            )
    return _joined(models[first], program, base, [run.adapter for run in runs], adapters)


def _quantized(run: Run) -> str:
    """Returns the format of a run's frozen weights, "" if they are not quantized."""
    frozen = run.precision.frozen
    return frozen if run.adapter is not None and frozen in ("int8", "nf4") else ""


def _check_adapter(source: str, adapter: Lora | None) -> None:
    """Raises ConfigError if an adapter changes more than sums of products."""
    fix = "sample with it alone, without --adapter"
    if adapter is not None and adapter.dora:
        raise ConfigError(f"{source}: has magnitudes (DoRA), which are those of a whole batch; {fix}")
    if adapter is not None and adapter.trained:
        raise ConfigError(f"{source}: has trained {', '.join(adapter.trained)}, which a whole batch uses; {fix}")


def _joined(
    model: LanguageModel,
    program: Program,
    base: Params,
    configs: Sequence[Lora | None],
    adapters: Sequence[LoadedAdapter],
) -> AdaptedModel:
    """Puts the matrices of adapters side by side; a weight that one of them does not change has zeros of its own."""
    ranks = [0 if config is None else config.rank for config in configs]
    ends, rank = np.cumsum(ranks), sum(ranks)
    columns_AR = (np.arange(rank) < ends[:, None]) & (np.arange(rank) >= (ends - ranks)[:, None])
    weights = {adapted_path(path) for adapter in adapters for path in adapter.params}
    # Factors are multiplied with `b`: the matrices of all have one alpha.
    joint = _SideBySide(rank=rank, alpha=rank, targets=tuple(sorted(weights)))
    program = Program(replace(program.run, adapter=joint), program.mesh)
    specs, shapes, params = leaves_by_name(program.specs), leaves_by_name(program.params), dict[str, jax.Array]()
    with program.on_mesh:
        for path in (path for path in shapes if ".adapter" in path):
            found = [
                _part(config, adapter.params, path, specs[path], shapes[path])
                for config, adapter in zip(configs, adapters, strict=True)
                if config is not None
            ]
            params[path] = jnp.concatenate(found, axis=_rank_dim(path, specs[path]))
    return AdaptedModel(model, program, merge_trees(base, nested(params)), columns_AR)


def _rank_dim(path: str, spec: ParamSpec) -> int:
    return spec.in_dims[0] if path.endswith(".b") else len(spec.shape) - 1


def _part(
    config: Lora, params: Mapping[str, jax.Array], path: str, spec: ParamSpec, whole: jax.ShapeDtypeStruct
) -> jax.Array:
    """Returns the columns of `a`, or the rows of `b` times their factor, that one adapter has."""
    if path in params:
        factor = config.alpha / config.rank if path.endswith(".b") else 1.0
        return jax.device_put((factor * params[path]).astype(whole.dtype), whole.sharding)
    shape = list(whole.shape)
    shape[_rank_dim(path, spec)] = config.rank
    return jnp.zeros(shape, whole.dtype, out_sharding=whole.sharding)
