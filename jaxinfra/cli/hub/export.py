"""`python -m launch hub export RUN OUT`: writes a checkpoint as a folder that transformers and engines load."""

import argparse
import logging
import time
from pathlib import Path

import jax.numpy as jnp

from jaxinfra.cli.conversation import end_of_turn, trained_template
from jaxinfra.cli.progress import ByteProgress
from jaxinfra.command import command_line
from jaxinfra.config import read_record
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.hub.adapter import export_adapter
from jaxinfra.hub.export import Export, export_model
from jaxinfra.hub.peft import open_base, open_peft
from jaxinfra.hub.published_model import PublishedModel, open_published, param_specs
from jaxinfra.inference.language_model import LanguageModel, open_language_model, require_text
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import load_params, merged_params, weights_digest
from jaxinfra.interop.folder import is_published
from jaxinfra.interop.writing import check_destination
from jaxinfra.machine.compile_cache import compile_cache
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.registry import signing
from jaxinfra.run import Run
from jaxinfra.storage import audit
from jaxinfra.storage.location import is_remote
from jaxinfra.track.formatting import format_bytes, format_duration, format_files
from jaxinfra.track.runs import parse_source, record_of

_log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> None:
    """Writes the folder in all processes; process 0 prints what it has written."""
    source = _with_step(options.run_dir, options.step)
    if options.sign is not None:
        if is_remote(options.out) or is_published(source):
            raise ConfigError("--sign: signs the export of a run in a folder on a disk; leave it out")
        signing.check_key(Path(options.sign))
    check_destination(options.out)
    is_model = is_published(source) and open_peft(source) is None
    stored = open_published(source).stored_dtypes() if is_model else {}
    model, dtypes = open_language_model(source, options.overrides, options.imports), dict(stored)
    origin = _origin(source, model)
    _check_kind(source, model.run, origin, options)
    if options.merge and origin is not None:
        dtypes = origin.stored_dtypes()
    if options.dtype is not None:  # buffers, such as biases of routers, keep theirs
        specs = param_specs(require_text(model.run)[0])
        dtypes |= {path: jnp.dtype(options.dtype) for path, spec in specs.items() if spec.state != "buffer"}
    template = None if is_published(source) else trained_template(model)
    ends = () if template is None else end_of_turn(template, model.tokenizer)
    program = sampling_program(model.run, all_devices(), strict=bool(options.overrides))
    peers, start_s = current_peers(), time.monotonic()
    with compile_cache(model.run.train.compile_cache):
        loaded = load_params(source, program, peers, stored)
        about = {
            "source": parse_source(source)[0],
            "step": loaded.step,
            "config": loaded.fingerprint,
            "checkpoint": loaded.digest,
        }
        progress = ByteProgress() if options.prints else lambda done, total: None
        writing = {"max_file_bytes": options.max_shard_size, "gather": peers.gather, "progress": progress}
        with program.on_mesh:
            if options.adapter:
                assert origin is not None and model.run.adapter is not None
                about["base_weights"] = weights_digest(program, loaded.params)
                receipt = export_adapter(
                    options.out,
                    model.run.adapter,
                    loaded.params,
                    program.base.specs,
                    origin,
                    None if template is None else template.source,
                    ends,
                    source=about,
                    **writing,
                )
            else:
                export = Export(
                    config=require_text(model.run)[0].in_mup(model.run.width_ratio),
                    params=merged_params(program, loaded.params) if options.merge else loaded.params,
                    source=about,
                    tokenizer=model.tokenizer,
                    max_positions=require_text(model.run)[1].seq_len if origin is None else origin.max_positions,
                    first_tokens=model.first_tokens,
                    dtypes=dtypes,
                    model_type=options.family,
                    origin=origin,
                    chat_template=None if template is None else template.source,
                    end_of_turn=ends,
                )
                receipt = export_model(options.out, export, **writing)
    if options.prints:
        record = {} if is_published(source) else read_record(record_of(parse_source(source)[0]))
        if options.sign is not None:
            signing.sign(Path(options.out), Path(options.sign), receipt, record)
        if model.run.track.audit is not None:
            audit.append(model.run.track.audit, "exported", options.out, **receipt)
        total = sum(entry["bytes"] for entry in receipt["files"].values())
        seconds = time.monotonic() - start_s
        written = f"{format_files(len(receipt['files']))}, {format_bytes(total)} in {format_duration(seconds)}"
        check = f"check it with {command_line('hub', 'check', options.out)} --hashes"
        print(f"{options.out}: {written}; {'PEFT finds its base by its config' if options.adapter else check}")


def _check_kind(source: str, run: Run, origin: PublishedModel | None, options: argparse.Namespace) -> None:
    """Raises ConfigError unless the options say what becomes of an adapter, where there is one."""
    named = "--adapter" if options.adapter else "--merge"
    if run.adapter is None and (options.adapter or options.merge):
        raise ConfigError(f"{named}: {source} has no adapter; leave the option out")
    if run.adapter is not None and not (options.adapter or options.merge):
        raise ConfigError(
            f"{source}: has an adapter; use --adapter to write it for PEFT, or --merge to write the model with it"
        )
    if options.adapter and origin is None:
        raise ConfigError(f"--adapter: the base of {source} is no published model, which PEFT needs; use --merge")
    if options.adapter and run.adapter is not None and run.adapter.trained:
        names = ", ".join(run.adapter.trained)
        raise ConfigError(f"--adapter: {source} has trained {names} as a whole; use --merge to write the model with it")
    if options.adapter and origin is not None and (size := require_text(run)[0].vocab_size) != origin.config.vocab_size:
        grown = f"{source} has {size:,} tokens, its base {origin.config.vocab_size:,}"
        raise ConfigError(f"--adapter: {grown}; use --merge to write the model with all of them")
    if options.adapter and options.family is not None:
        raise ConfigError(f"--family {options.family}: an adapter has the family of its base; leave the option out")


def _with_step(source: str, step: int | None) -> str:
    if step is None:
        return source
    if is_published(source) or parse_source(source)[1] is not None:
        raise ConfigError(f"--step {step}: {source} is one checkpoint already; leave the option out")
    return f"{source}@{step}"


def _origin(source: str, model: LanguageModel) -> PublishedModel | None:
    """Returns the published model that this one comes from; None if there is none, or it is gone."""
    if is_published(source):
        return open_base(source)
    init = model.run.init
    while init is not None and not is_published(init):  # an adapter may go on from that of another run
        if model.run.adapter is None:
            return None
        init = (read_record(record_of(parse_source(init)[0])).get("init") or {}).get("run")
    if init is None:
        return None
    try:
        return open_base(init)
    except (ConfigError, DataError, StorageError) as error:
        _log.warning("%s: its chat template and generation config are not copied", error)
        return None
