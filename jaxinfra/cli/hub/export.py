"""`python -m launch hub export RUN OUT`: writes a checkpoint as a folder that transformers and engines load."""

import argparse
import logging
import time

import jax.numpy as jnp

from jaxinfra.cli.progress import ByteProgress
from jaxinfra.command import command_line
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.hub.export import Export, export_model
from jaxinfra.hub.published_model import PublishedModel, open_published, param_specs
from jaxinfra.inference.language_model import LanguageModel, open_language_model, require_text
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import load_params
from jaxinfra.interop.folder import is_published
from jaxinfra.interop.writing import check_destination
from jaxinfra.machine.compile_cache import compile_cache
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.track.formatting import format_bytes, format_duration, format_files
from jaxinfra.track.runs import parse_source

_log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> None:
    """Writes the folder in all processes; process 0 prints what it has written."""
    source = _with_step(options.run_dir, options.step)
    check_destination(options.out)
    stored = open_published(source).stored_dtypes() if is_published(source) else {}
    model, dtypes = open_language_model(source, options.overrides, options.imports), dict(stored)
    if model.run.adapter is not None:  # else the weights would be written without it
        raise ConfigError(f"{source}: has an adapter, which is not exported; use it here, by `sample` and `evaluate`")
    if options.dtype is not None:  # buffers, such as biases of routers, keep theirs
        specs = param_specs(require_text(model.run)[0])
        dtypes |= {path: jnp.dtype(options.dtype) for path, spec in specs.items() if spec.state != "buffer"}
    program = sampling_program(model.run, all_devices(), strict=bool(options.overrides))
    peers, start_s = current_peers(), time.monotonic()
    origin = _origin(source, model)
    with compile_cache(model.run.train.compile_cache):
        loaded = load_params(source, program, peers, stored)
        with program.on_mesh:
            export = Export(
                config=require_text(model.run)[0],
                params=loaded.params,
                source={
                    "source": parse_source(source)[0],
                    "step": loaded.step,
                    "config": loaded.fingerprint,
                    "checkpoint": loaded.digest,
                },
                tokenizer=model.tokenizer,
                max_positions=require_text(model.run)[1].seq_len if origin is None else origin.max_positions,
                first_tokens=model.first_tokens,
                dtypes=dtypes,
                model_type=options.family,
                origin=origin,
            )
            progress = ByteProgress() if options.prints else lambda done, total: None
            size = options.max_shard_size
            receipt = export_model(options.out, export, max_file_bytes=size, gather=peers.gather, progress=progress)
    if options.prints:
        total = sum(entry["bytes"] for entry in receipt["files"].values())
        seconds = time.monotonic() - start_s
        written = f"{format_files(len(receipt['files']))}, {format_bytes(total)} in {format_duration(seconds)}"
        print(f"{options.out}: {written}; check it with {command_line('hub', 'check', options.out)} --hashes")


def _with_step(source: str, step: int | None) -> str:
    if step is None:
        return source
    if is_published(source) or parse_source(source)[1] is not None:
        raise ConfigError(f"--step {step}: {source} is one checkpoint already; leave the option out")
    return f"{source}@{step}"


def _origin(source: str, model: LanguageModel) -> PublishedModel | None:
    """Returns the published model that this one comes from; None if there is none, or it is gone."""
    if is_published(source):
        return open_published(source)
    if model.run.init is None or not is_published(model.run.init):
        return None
    try:
        return open_published(model.run.init)
    except (ConfigError, DataError, StorageError) as error:
        _log.warning("%s: its chat template and generation config are not copied", error)
        return None
