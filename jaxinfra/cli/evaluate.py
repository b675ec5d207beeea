"""`python -m launch evaluate RUN_DIR`: evaluates a checkpoint of a run on the devices and the mesh that there are."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.text import Text

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.cli import output_file
from jaxinfra.config import load
from jaxinfra.parallel.spec import Params
from jaxinfra.program import TrainState
from jaxinfra.run import Run
from jaxinfra.run_dir import RunDirectory
from jaxinfra.runtime.compile_cache import compile_cache
from jaxinfra.runtime.peers import current_peers
from jaxinfra.runtime.shared_reads import read_by_first
from jaxinfra.track.console import stdout_console, titled_table
from jaxinfra.track.formatting import summary_rows
from jaxinfra.track.runs import parse_source, record_of
from jaxinfra.train.trainer import Trainer
from jaxinfra.trained_params import load_params


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Evaluates in all processes; process 0 prints the metrics, and the baselines if the data has some."""
    is_main = current_peers().index == 0
    if options.json is not None and is_main:
        output_file.check_writable(options.json)
    path, _ = parse_source(options.run_dir)
    trainer = Trainer(load(record_of(path), options.overrides, Run, options.imports))
    with read_by_first(current_peers()):
        dataset = trainer.dataset
    trainer.require_equal_processes()
    with compile_cache(trainer.run.train.compile_cache):
        step, fingerprint = _restore(trainer, options.run_dir)
        values = trainer.evaluate()
    if is_main:
        result = _result(trainer, path, step, values) | {"data": dataset.fingerprint} | {"fingerprint": fingerprint}
        _print(result)
        if options.json is not None:
            output_file.write_text(options.json, json.dumps(result, indent=2) + "\n")
    return 0


def _restore(trainer: Trainer, source: str) -> tuple[int, str]:
    """Restores the parameters onto the trainer's mesh; returns their step and the fingerprint of their config.

    An objective with a reference gets that of the same checkpoint.
    """
    loaded = load_params(source, trainer.program)
    trainer.state = TrainState(
        step=jnp.asarray(loaded.step, jnp.int32),
        params=loaded.params,
        opt_state=(),
        ema=None,  # the parameters are the averaged ones if the run keeps an average
        reference=_reference(trainer, source, loaded.step) if trainer.run.objective.uses_reference else None,
    )
    return loaded.step, loaded.fingerprint


def _reference(trainer: Trainer, source: str, step: int) -> Params:
    program, directory = trainer.program, RunDirectory(parse_source(source)[0])
    with program.on_mesh, CheckpointManager(directory.checkpoints, read_only=True) as checkpoints:
        return checkpoints.restore_params(step, program.params, subtree="reference")


def _result(trainer: Trainer, path: str, step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """Returns what is printed and written as JSON."""
    run = trainer.run
    return {
        "run": path,
        "step": step,
        "samples": len(trainer.dataset.validation(run.train.eval_samples)),
        "validation": {name.removeprefix("eval/"): value for name, value in values.items()},
        "baselines": trainer.baselines,
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "mesh": dict(trainer.program.mesh.shape),
    }


def _print(result: Mapping[str, Any]) -> None:
    sizes = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1) or "one device"
    samples = f"{result['samples']:,} validation sample{'s' * (result['samples'] > 1)}"
    console, title = stdout_console(), f"{result['run']}, step {result['step']}: {samples}, {sizes}"
    table = titled_table("", "metric")
    table.add_column("value", justify="right")
    for label, value in summary_rows({"validation": result["validation"], "baselines": result["baselines"]}):
        table.add_row(label, value)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
