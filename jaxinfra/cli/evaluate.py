"""`python -m launch evaluate RUN_DIR`: evaluates a checkpoint of a run on the devices and the mesh that there are."""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Column, Table
from rich.text import Text

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.cli.conversation import conversation_template, with_end_of_turn
from jaxinfra.config import load
from jaxinfra.errors import ConfigError
from jaxinfra.inference.language_model import open_language_model
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.trained_params import TrainedParams, load_params
from jaxinfra.interop.folder import is_published
from jaxinfra.machine.compile_cache import compile_cache
from jaxinfra.parallel.spec import Params
from jaxinfra.prepare.documents.chat_template import ChatTemplate, Message
from jaxinfra.prepare.documents.document import RecordError
from jaxinfra.processes.peers import current_peers
from jaxinfra.processes.shared_reads import read_by_first
from jaxinfra.program import Program, TrainState
from jaxinfra.run import Run
from jaxinfra.run_dir import RunDirectory
from jaxinfra.storage import outputs
from jaxinfra.tasks.harness import Tasks, is_standard_error
from jaxinfra.track.console import print_table, stdout_console, titled_table
from jaxinfra.track.formatting import format_metric, summary_rows
from jaxinfra.track.runs import parse_source, record_of
from jaxinfra.train.trainer import Trainer


def run(options: argparse.Namespace) -> None:
    """Evaluates in all processes; process 0 prints the metrics, and the baselines if the data has some."""
    if options.prints:
        outputs.check_writable(options.json)
    result = evaluate(options)
    if options.prints:
        print_result(result)
        outputs.write_json(options.json, result)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what is written as JSON: the metrics, with the checkpoint and the data that they are of."""
    of_tasks = {"--limit": options.limit, "--num-fewshot": options.num_fewshot, "--chat": options.chat or None}
    of_chat = {"--template": options.template, "--system": options.system}
    if options.tasks is None and (given := [name for name, value in of_tasks.items() if value is not None]):
        raise ConfigError(f"{', '.join(given)}: of tasks; name some with --tasks, or use train.eval_samples=100")
    if not options.chat and (given := [name for name, value in of_chat.items() if value is not None]):
        raise ConfigError(f"{', '.join(given)}: of conversations; add --chat")
    return _validate(options) if options.tasks is None else _run_tasks(options)


def print_result(result: Mapping[str, Any]) -> None:
    """Prints the metrics as a table."""
    _print_tasks(result) if "tasks" in result else _print_validation(result)


def _validate(options: argparse.Namespace) -> dict[str, Any]:
    if is_published(options.run_dir):
        raise ConfigError(f"{options.run_dir}: published weights have no validation samples; name tasks with --tasks")
    path, _ = parse_source(options.run_dir)
    trainer = Trainer(load(record_of(path), options.overrides, Run, options.imports))
    with read_by_first(current_peers()):
        dataset = trainer.dataset
    trainer.require_equal_processes()
    with compile_cache(trainer.run.train.compile_cache):
        loaded = _restore(trainer, options.run_dir)
        values = trainer.evaluate()
    found = {
        "samples": len(dataset.validation(trainer.run.train.eval_samples)),
        "validation": {name.removeprefix("eval/"): value for name, value in values.items()},
        "baselines": trainer.baselines,
    }
    return _result(path, loaded, trainer.program, found) | {"data": dataset.fingerprint}


def _run_tasks(options: argparse.Namespace) -> dict[str, Any]:
    path, _ = parse_source(options.run_dir)
    tasks = Tasks(options.tasks.split(","), num_fewshot=options.num_fewshot)
    with read_by_first(current_peers()):
        model = open_language_model(options.run_dir, options.overrides, options.imports)
        by_template = None
        if options.chat:
            template = conversation_template(options.run_dir, model, options.template, own_only=True)
            if not is_published(options.run_dir) or options.template is not None:
                model = with_end_of_turn(model, template)
            by_template = partial(render, template)
    tasks.check_room(model.max_length)
    sampler, loaded = Sampler.load(options.run_dir, model, options.overrides)
    with compile_cache(model.run.train.compile_cache):
        found = tasks.run(sampler, limit=options.limit, render=by_template, system=options.system)
    return _result(path, loaded, sampler.program, {"tasks": found})


def render(template: ChatTemplate, messages: Sequence[Message], continues: bool) -> str:
    """Renders messages as `tasks.harness.Render` says."""
    try:
        return template.to_text(messages, continues=continues)
    except RecordError as error:
        raise ConfigError(f"--chat: {error}; name another template with --template") from None


def _restore(trainer: Trainer, source: str) -> TrainedParams:
    """Restores the parameters onto the trainer's mesh.

    An objective with a reference gets that of the same checkpoint.
    """
    loaded = load_params(source, trainer.program, trainer.job.peers)
    trainer.state = TrainState(
        step=jnp.asarray(loaded.step, jnp.int32),
        params=loaded.params,
        opt_state=(),
        ema=None,  # the parameters are the averaged ones if the run keeps an average
        reference=_reference(trainer, source, loaded.step) if trainer.program.keeps_reference else None,
    )
    return loaded


def _reference(trainer: Trainer, source: str, step: int) -> Params:
    program, directory = trainer.program, RunDirectory(parse_source(source)[0])
    with program.on_mesh, CheckpointManager(directory.checkpoints, read_only=True) as checkpoints:
        return checkpoints.restore_params(step, program.kept(program.params), subtree="reference")


def _result(path: str, loaded: TrainedParams, program: Program, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is printed and written as JSON."""
    return {
        "run": path,
        "step": loaded.step,
        **found,
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "mesh": dict(program.mesh.shape),
        "fingerprint": loaded.fingerprint,
        "checkpoint": loaded.digest,
    }


def _print_validation(result: Mapping[str, Any]) -> None:
    table = titled_table("", "metric", Column("value", justify="right"))
    for label, value in summary_rows({"validation": result["validation"], "baselines": result["baselines"]}):
        table.add_row(label, value)
    _print(result, f"{result['samples']:,} validation sample{'s' * (result['samples'] > 1)}", table)


def _print_tasks(result: Mapping[str, Any]) -> None:
    samples, value, error = (Column(name, justify="right") for name in ("samples", "value", "standard error"))
    table = titled_table("", "task", samples, "metric", value, error)
    for task, metrics in result["tasks"].items():
        values = {name: value for name, value in metrics.items() if name != "samples" and not is_standard_error(name)}
        first = [task, f"{metrics['samples']:,}" if "samples" in metrics else ""]
        for name, value in values.items():
            metric, slash, label = name.partition("/")
            error = metrics.get(f"{metric}_stderr{slash}{label}")  # such as "exact_match_stderr/strict"
            table.add_row(*first, name, format_metric(value), "" if error is None else format_metric(error))
            first = ["", ""]
    _print(result, "tasks of lm-eval", table)


def _print(result: Mapping[str, Any], what: str, table: Table) -> None:
    sizes = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1) or "one device"
    console, title = stdout_console(), f"{result['run']}, step {result['step']}: {what}, {sizes}"
    console.print(Text(title, style="bold"), soft_wrap=True)
    print_table(console, table)
