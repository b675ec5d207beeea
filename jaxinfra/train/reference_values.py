"""Computes what the reference of an objective gives for each sample, once before the first step.

Every process keeps all of it in memory. Process 0 writes it into the version of the store, part by part, so that a
start that was killed goes on where it was, and other runs with the same reference find it. `reference/KEY/train/0` has
the first `_PART` samples of the training split: float32 `[samples, fields]`, then their XXH3-128. KEY is a hash of all
that decides them. A file is written whole or not at all.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
import xxhash

from jaxinfra.config import encode
from jaxinfra.data.batches import BatchLoader
from jaxinfra.data.interfaces import KeepsReferences, Samples
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.inference.trained_params import load_params, weights_digest
from jaxinfra.interop.folder import is_published
from jaxinfra.parallel.spec import Params
from jaxinfra.train.job import Job
from jaxinfra.train.phases import Phases

_PART = 16 * 1024
_log = logging.getLogger(__name__)


def reference_key(job: Job, params: Params) -> str:
    """Returns a hash of what decides the values: the loaded parameters, the model, its numbers and the samples."""
    run = job.run
    data, fields = job.data.dataset.fingerprint, job.program.objective.reference_fields
    of = [encode(run.model), asdict(run.precision), run.train.canonical, run.data.units_per_sample, data, *fields]
    content = json.dumps([weights_digest(job.program, params, frozen=False), *of], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def fill_references(
    job: Job,
    init: Mapping[str, Any] | None,
    phases: Phases,
    params: Params | None = None,
    splits: Sequence[str] = ("train", "validation"),
) -> None:
    """Reads the values of splits, computes those that are missing, and hands them to the dataset.

    All processes must call it. `init` is the origin of the parameters in the run record; `params` are the parameters of
    the reference, and None loads them from there if they are needed. Raises ConfigError if those are other ones by now,
    or if the run was started without a cache.
    """
    dataset = job.data.dataset
    if not isinstance(dataset, KeepsReferences) or dataset.references is None or dataset.references.keys() >= {*splits}:
        return
    assert init is not None, "a run with a reference has a field `init`"
    if "reference" not in init:
        cause = "the run was started without it, so its state has the reference"
        raise ConfigError(f"data.cached_reference=true: {cause}; use data.cached_reference=false")
    found: dict[str, np.ndarray] = {}
    for split in splits:
        samples, parts = dataset.train if split == "train" else dataset.validation(), list[np.ndarray]()
        for start in range(0, len(samples), _PART):
            ids = np.arange(start, min(start + _PART, len(samples)))
            storage, name = dataset.store.storage, f"reference/{init['reference']}/{split}/{start // _PART}"
            with phases("evaluation"):  # each part anew, as the watchdog limits the time of a phase
                values = _parse(storage.read_or_none(name), len(ids))
                if not all(job.peers.gather(values is not None)):
                    if job.is_main:
                        _log.warning("%s: computing the reference of samples %d to %d, once", split, ids[0], ids[-1])
                    params = _load(job, init) if params is None else params
                    values, is_whole = _compute(job, params, samples, ids)
                    if job.is_main and is_whole:
                        content = values.astype("<f4").tobytes()
                        try:
                            storage.write(name, content + xxhash.xxh3_128_digest(content))
                        except StorageError as error:
                            raise StorageError(f"{error}, or use data.cached_reference=false") from None
            assert values is not None
            parts.append(values)
        found[split] = np.concatenate(parts)
    dataset.references |= found


def _parse(content: bytes | None, samples: int) -> np.ndarray | None:
    """Returns the values of a file, float32 `[samples, fields]`; None if they are missing or damaged."""
    values, digest = (content or b"")[:-16], (content or b"")[-16:]
    if len(values) % (4 * samples) or xxhash.xxh3_128_digest(values) != digest:
        return None
    return np.frombuffer(values, "<f4").reshape(samples, -1).astype(np.float32)


def _load(job: Job, init: Mapping[str, Any]) -> Params:
    """Loads the parameters of the reference again; ConfigError if they have changed."""
    source = init["run"] if is_published(init["run"]) else f"{init['run']}@{init['step']}"
    loaded = load_params(source, job.program, job.peers).params
    if reference_key(job, loaded) != init["reference"]:
        raise ConfigError(
            f"init={source}: its weights, or the data, are other ones than when the run has started, and "
            f"{job.data.dataset.name}/reference/{init['reference']} is not whole; restore one of them"
        )
    with job.program.on_mesh:
        return jax.jit(lambda params: job.program.init_from(params).params)(loaded)


def _compute(job: Job, params: Params, samples: Samples, ids: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns the values of samples, float32 `[samples, fields]`, and whether none of them is damaged."""
    batches = BatchLoader(
        job.run.data,
        samples,
        global_batch=job.run.train.global_batch,
        rows=job.data.rows,
        start_step=0,
        steps=-(-len(ids) // job.run.train.global_batch),
        sample_ids=lambda step, rows: ids[np.minimum(step * rows + np.arange(rows), len(ids) - 1)],
    )
    found = list[dict[str, jax.Array]]()
    with job.program.on_mesh:
        for _, batch in batches:
            jax.block_until_ready(found[-2:-1])  # the host is at most two batches ahead
            found.append(job.program.reference_step(params, job.data.place(batch)))
    values, fields = jax.device_get(found), job.program.objective.reference_fields
    columns = [np.concatenate([each[name] for each in values])[: len(ids)] for name in fields]
    return np.stack(columns, axis=1), not any(job.peers.gather(bool(batches.take_skipped(len(batches)))))
