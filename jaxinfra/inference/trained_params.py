"""Restores the parameters of a trained run, to evaluate them, to sample from them, or to start another run."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import decode
from jaxinfra.data.interfaces import Dataset
from jaxinfra.errors import CheckpointError, ConfigError
from jaxinfra.hub.params import PeftAdapter, check_init, load_published, open_peft
from jaxinfra.interop.folder import PREFIX, is_published
from jaxinfra.models.adapter import Lora
from jaxinfra.models.merged import merged
from jaxinfra.parallel.bits import sum_bits_of_shards
from jaxinfra.parallel.spec import Params, leaves_by_name, merge_trees, nested
from jaxinfra.processes.peers import Peers
from jaxinfra.program import Program, TrainState
from jaxinfra.run import Run
from jaxinfra.run_dir import RunDirectory
from jaxinfra.track.runs import no_run_error, parse_source


class TrainedParams(NamedTuple):
    """Parameters of a run, with their origin.

    Attributes:
        params: the parameters after `step`, averaged if the run keeps an average.
        step: number of completed steps.
        fingerprint: fingerprint of the run's config.
        digest: hash of the checkpoint, or of the headers of published weights.
    """

    params: Any
    step: int
    fingerprint: str
    digest: str


def load_params(
    source: str | Path, program: Program, peers: Peers, dtypes: Mapping[str, np.dtype] | None = None
) -> TrainedParams:
    """Restores the parameters of a run onto the mesh of a program whose model has the same parameters.

    `source` is a run directory, such as `runs/base` for its newest checkpoint, or `runs/base@500` for step 500; or a
    model in the format of Hugging Face, such as `hf:DIR` or `hf:ORG/NAME`, of which `dtypes` replace those of the
    program, by path. Raises ConfigError if there is no run, or if a parameter differs (it names the first one), and
    CheckpointError if no checkpoint can be read.
    """
    if is_published(source) and (peft := open_peft(str(source))) is not None:
        params, _, fingerprint, _ = load_params(peft.source, program, peers)
        adapter = _load_peft(peft, program, leaves_by_name(params))
        return TrainedParams(merge_trees(params, nested(adapter)), 0, fingerprint, fingerprint)
    base = program.base
    if is_published(source):
        with program.on_mesh:
            params, fingerprint = load_published(str(source), program.run.model, base.params, dtypes, program.from_base)
        return TrainedParams(params, 0, fingerprint, fingerprint)
    found, record = _restore(source, program, peers)
    if record is not None:
        return found._replace(params=merge_trees(load_base(program, peers, record), found.params))
    if base is not program:
        params = nested(reduce(or_, (program.from_base(*each) for each in leaves_by_name(found.params).items())))
        return found._replace(params=params)
    return found


def _restore(source: str | Path, program: Program, peers: Peers) -> tuple[TrainedParams, Mapping[str, Any] | None]:
    """Restores what a checkpoint has: parameters of `program.base`, or an adapter, with the record of its run."""
    location, step = parse_source(source)
    directory, base = RunDirectory(location, peers), program.base
    record = directory.existing_record()
    if not record:
        raise no_run_error(location)
    has_adapter = isinstance(record.get("config"), dict) and record["config"].get("adapter") is not None
    if has_adapter and program.run.adapter is None:
        fix = f"use the same adapter here, or init={(record.get('init') or {}).get('run')}, which it was trained beside"
        raise ConfigError(f"{location}: has an adapter, and this run has none; {fix}")
    if has_adapter and program.run.adapter is not None:
        coded = {name: value for name, value in record["config"]["adapter"].items() if name != "kind"}
        there, own = decode(Lora, coded), program.run.adapter
        shapes = [(each.rank, each.alpha, each.dora, {*each.targets}) for each in (there, own)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"{location}: this run has another adapter; use {adapter_overrides(there)}")
    missing = f"{directory.checkpoints}: no checkpoint{'' if step is None else f' of step {step}'}"
    if not directory.has_checkpoints():
        raise CheckpointError(f"{missing} yet; train until the first one is saved")
    with program.on_mesh, CheckpointManager(directory.checkpoints, read_only=True, gather=peers.gather) as checkpoints:
        # The model may leave out the modules for multi-token prediction that the run has.
        restore = partial(checkpoints.restore_params, optional="mtp")

        def read(step: int) -> tuple[Any, str]:
            digest = checkpoints.manifest(step).digest
            of = program if has_adapter else base
            if _recorded(record, "optim", "ema_decay") is not None:
                return restore(step, of.averaged_params, subtree="ema"), digest
            dtype = _recorded(record, "precision", "params") or "float32"
            return restore(step, of.kept(of.params_stored_as(dtype)), subtree="params"), digest

        # That run may still be training: all processes take the checkpoint that process 0 sees.
        existing = peers.gather(checkpoints.all_steps())[0]
        if not existing or step not in (None, *existing):
            available = ", ".join(map(str, existing)) or "none"
            raise CheckpointError(f"{missing}; it has {available}: train until the next one is saved")
        found = checkpoints.newest(read) if step is None else (step, read(step))
        assert found is not None
        step, (params, digest) = found
    loaded = TrainedParams(params, step, record.get("fingerprint", ""), digest)
    return loaded, record if has_adapter else None


class LoadedAdapter(NamedTuple):
    """An adapter without its base.

    Attributes:
        params: its parameters, by path; {} for a source that has no adapter.
        base: the source of its base.
        weights: hash of the frozen parameters that it was trained beside; None if that is not known.
    """

    params: Mapping[str, jax.Array]
    base: str
    weights: str | None


def load_adapter(source: str, program: Program, peers: Peers) -> LoadedAdapter:
    """Loads the adapter of a source, onto the mesh of a program with the same adapter; raises as `load_params`."""
    if program.run.adapter is None:
        return LoadedAdapter({}, source, None)
    if is_published(source) and (peft := open_peft(source)) is not None:
        return LoadedAdapter(_load_peft(peft, program, {}), peft.source, None)
    found, record = _restore(source, program, peers)
    assert record is not None  # as the run has an adapter
    return LoadedAdapter(leaves_by_name(found.params), base_source(record), (record.get("init") or {}).get("weights"))


def _load_peft(peft: PeftAdapter, program: Program, named: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Loads an adapter in the format of PEFT; raises ConfigError if the run has another one.

    `named` are the parameters of its base by path, which magnitudes need.
    """
    own, there = program.run.adapter, f"{PREFIX}{peft.folder.url}"
    if own is None:
        raise ConfigError(f"{there}: is an adapter, and this run has none; use {adapter_overrides(peft.config)}")
    with program.on_mesh:
        matrices = peft.params(named)
    wanted = {path: leaf for path, leaf in leaves_by_name(program.params).items() if ".adapter" in path}
    shapes = {path: array.shape for path, array in matrices.items()}
    if shapes != {path: leaf.shape for path, leaf in wanted.items()} or own.alpha != peft.config.alpha:
        raise ConfigError(f"{there}: this run has another adapter; use {adapter_overrides(peft.config)}")
    return {
        path: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, path=path: matrices[path][index])
        for path, leaf in wanted.items()
    }


def adapter_overrides(adapter: Lora) -> str:
    """Returns the overrides of a config, as a shell takes them."""
    fields = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": f"({','.join(adapter.targets)},)"}
    words = ["adapter=lora", *(f"adapter.{name}={value}" for name, value in fields.items())]
    return shlex.join([*words, *["adapter.dora=true"] * adapter.dora])


def base_source(record: Mapping[str, Any]) -> str:
    """Returns the source of the frozen parameters that an adapter was trained beside, by the record of its run."""
    init = record.get("init") or {}
    source = str(init.get("run"))
    return source if is_published(source) else f"{source}@{init.get('step')}"


def load_base(program: Program, peers: Peers, record: Mapping[str, Any]) -> Params:
    """Loads the frozen parameters that an adapter was trained beside, by the record of its run.

    Raises ConfigError if they are other ones by now.
    """
    source, expected = base_source(record), (record.get("init") or {}).get("weights")
    params = load_params(source, program, peers).params
    if (found := weights_digest(program, params)) != expected:
        raise ConfigError(
            f"init={source}: has other weights than those that the adapter was trained beside "
            f"({found}, then {expected}); restore them there"
        )
    return params


def with_base(state: TrainState, program: Program, peers: Peers, record: Mapping[str, Any]) -> TrainState:
    """Returns a state that was restored from a checkpoint, with the frozen parameters that its run has in its base."""
    if program.run.adapter is None:
        return state
    return replace(state, params=merge_trees(load_base(program, peers, record), state.params))


def merged_params(program: Program, params: Params) -> Params:
    """Returns the parameters of `program.base`, with the adapter of the run: float32 where it has one."""
    found, whole, specs = (leaves_by_name(each) for each in (params, program.base.params, program.base.specs))
    axes = {path: each.sharding.spec.partitions for path, each in whole.items()}
    with program.on_mesh:
        return nested({path: merged(found, path, specs[path], program.run.adapter, axes[path]) for path in specs})


def weights_digest(program: Program, params: Params, *, frozen: bool = True) -> str:
    """Returns a hash of the frozen parameters, or of all, as they are stored; it does not depend on the mesh."""
    specs, arrays = leaves_by_name(program.specs), leaves_by_name(params)
    arrays = {path: array for path, array in arrays.items() if not frozen or specs[path].state == "frozen"}
    with program.on_mesh:
        sums = jax.device_get(jax.jit(partial(jax.tree.map, sum_bits_of_shards))(arrays))
    return hashlib.sha256(repr([(path, int(sums[path])) for path in sorted(sums)]).encode()).hexdigest()[:16]


def check_source(source: str, run: Run, dataset: Dataset) -> None:
    """Raises ConfigError if published weights are those of another model than a run, or of another tokenizer."""
    if is_published(source):
        check_init(source, run.model, getattr(dataset, "tokenizer", None))


def _recorded(record: Mapping[str, Any], part: str, field: str) -> Any:
    """Returns a field of the config in a run record; None if the record has none."""
    config = record.get("config")
    fields = config.get(part) if isinstance(config, dict) else None
    return fields.get(field) if isinstance(fields, dict) else None
