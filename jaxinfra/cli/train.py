"""`python -m launch CONFIG [KEY=VALUE ...]`: trains on the devices of all processes of the run."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence

from jaxinfra.cli import config_argument, sweep
from jaxinfra.command import command_line
from jaxinfra.config.classes import user_classes
from jaxinfra.errors import ConfigError
from jaxinfra.inference.language_model import conversation_template_name, is_text
from jaxinfra.run import Run
from jaxinfra.track.formatting import shown_metrics
from jaxinfra.track.terminal_plot import plot_curve
from jaxinfra.train.trainer import Trainer


def run(options: argparse.Namespace) -> None:
    """Trains or resumes, plots the loss, and says what to do next; or only compiles."""
    if options.elastic is not None:
        raise ConfigError(f"--elastic {'..'.join(map(str, options.elastic))}: needs a supervisor; add --supervise")
    if options.sweep:
        return sweep.run(options)
    command = ["python", "-m", "launch", *options.argv]
    loaded = config_argument.load_config(options)
    prepare = config_argument.prepare_command(options, loaded.run)
    trainer = Trainer(loaded, command=command, prepare_command=prepare, accept_change=options.accept_change)
    if options.compile_only:
        seconds = trainer.compile()
        if options.prints:
            mesh = ", ".join(f"{axis} {n}" for axis, n in trainer.program.mesh.shape.items() if n > 1) or "one device"
            print(f"compiled for {mesh} in {seconds:.1f} s; nothing is trained")
        return
    summary, run_dir = trainer.train(), trainer.run_dir.location
    if not options.prints:
        return
    if summary["status"] == "finished before":
        print(
            f"nothing to do: all {summary['steps']} steps of {run_dir} are done; to train on from its parameters, with "
            f"a new schedule, use name=ANOTHER init={run_dir}"
        )
    elif loaded.run.track.console != "off":
        _plot_loss(trainer.metrics)
    if loaded.run.track.console != "off":
        print(f"next:\n  {command_line('runs', *([] if loaded.run.root == Run.root else [loaded.run.root]))}")
        if is_text(loaded.run):
            files = [*options.imports, *([options.config] if options.config.endswith(".py") else [])]
            imports = "".join(f" --import {shlex.quote(file)}" for file in files) if user_classes(loaded.run) else ""
            if conversation_template_name(loaded.run) is None:
                print(f'  {command_line("sample", run_dir)} "PROMPT"{imports}')
            else:
                print(f"  {command_line('chat', run_dir)}{imports}")
        print(f"  and in a browser {summary.get('report', f'{run_dir}/report.html')}")


def _plot_loss(metrics: Sequence[Mapping[str, float]]) -> None:
    """Plots the training loss, the mean over each logged interval; in ASCII where the terminal has no more."""
    losses = [(int(row["step"]), shown_metrics(row)["loss"]) for row in metrics if "loss" in row]
    if losses:
        is_ascii = "utf" not in (sys.stdout.encoding or "").lower()
        print(f"Training loss\n{plot_curve(losses, ascii=is_ascii)}")
