"""`python -m launch CONFIG --sweep FIELD=a,b,c`: trains a run for each value, or for each combination of values.

The runs have a folder of their own, and names after their values. The same command goes on with what a stop has left.
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

from jaxinfra.cli import config_argument
from jaxinfra.cli.sweep_table import Sweep, overview_of, print_sweep, read_sweep, write_sweep
from jaxinfra.command import command_line
from jaxinfra.config import fingerprint, load_file, validate
from jaxinfra.config.overrides import read_overrides
from jaxinfra.errors import ConfigError, NonFiniteError, Preempted
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.run_dir import join_location
from jaxinfra.train.trainer import Trainer

_BETWEEN_VALUES = re.compile(r",(?![^()]*\))")  # a comma that is not in parentheses


def run(options: argparse.Namespace) -> None:
    """Trains the runs that are not done, one after the other, and prints a table of all.

    Raises ConfigError before the first begins if one cannot be trained, and Preempted at a request to stop. A run whose
    loss is not finite is a row of the table.
    """
    location, axes, peers = folder(options), [parse_axis(text) for text in options.sweep], current_peers()
    points = combinations(axes)
    values = {name_of(point): point for point in points}
    if len(values) < len(points):
        raise ConfigError("--sweep: two runs have the same name, as / becomes _ in it; use other values")
    file, devices = load_file(options.config, Run, options.imports), len(all_devices())
    others = [each for each in options.overrides if each.partition("=")[0].strip() not in ("name", "root")]
    runs = {
        name: file.with_overrides([*others, *map("=".join, point.items()), f"name={name}", f"root={location}"])
        for name, point in values.items()
    }
    trainers = {}
    for name, each in runs.items():
        validate(with_mesh_size(each.run, devices))
        command = ["python", "-m", "launch", *options.argv]
        prepare = config_argument.prepare_command(options, each.run)
        trainer = Trainer(each, command=command, prepare_command=prepare, accept_change=options.accept_change)
        _ = trainer.program, trainer.dataset  # what is wrong with one of them is said before the first begins
        trainers[name] = trainer
    sweep = Sweep(axes=[[*axis[0]] for axis in axes], values=values, errors={})
    if peers.index == 0 and (before := read_sweep(location)) is not None and before.axes == sweep.axes:
        sweep = replace(before, values={**before.values, **values})  # also shows earlier runs with other values
    if options.prints:
        print(f"{len(runs)} runs, one after the other, in {location}:")
        print_sweep(location, sweep)
        write_sweep(location, sweep)
    for number, (name, loaded) in enumerate(runs.items(), 1):
        found = overview_of(location, name) if peers.index == 0 else None
        is_over = found is not None and (found.state == "finished" or name in sweep.errors)
        if peers.broadcast(found is not None and is_over and found.fingerprint == fingerprint(loaded.run)):
            continue
        if options.prints:
            print(f"run {number} of {len(runs)}: {name}", flush=True)
        try:
            trainers.pop(name).train()  # whose state would stay on the devices
        except NonFiniteError as error:
            sweep = replace(sweep, errors={**sweep.errors, name: str(error)})
            if options.prints:
                print(f"{name}: {error}", flush=True)
                write_sweep(location, sweep)
        # A request that came with the last step has not stopped that run.
        if (reason := peers.agreement.due("stop", loaded.run.train.steps)) is not None:
            raise Preempted(f"{location}: stopped by {reason} after {name}; start the same command to go on")
    if options.prints:
        print_sweep(location, sweep)
        print(f"next: {command_line('runs', location)}")


def folder(options: argparse.Namespace) -> str:
    """Returns the folder or URL of the runs, beside the run that the command would train without --sweep."""
    for option in ("compile_only", "elastic"):
        if getattr(options, option):
            raise ConfigError(f"--{option.replace('_', '-')}: is for one run; leave it out, or leave out --sweep")
    run = config_argument.load_config(options).run
    return join_location(run.root, f"{run.name}-sweep")


def parse_axis(text: str) -> list[dict[str, str]]:
    """Parses FIELD=a,b,c, or several of these that change together, into the texts of the fields for each run."""
    fields = {
        each.path: [value.strip() for value in _BETWEEN_VALUES.split(each.text)]
        for each in read_overrides(text.split())
    }
    counts = {len({*values}) if all(values) else 0 for values in fields.values()}
    if len(counts) != 1 or 0 in counts or counts != {len(values) for values in fields.values()}:
        message = "needs different values, for several fields as many to each"
        raise ConfigError(f"--sweep {text}: {message}; use --sweep optim.peak_lr=1e-3,2e-3,4e-3")
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def combinations(axes: Sequence[Sequence[dict[str, str]]]) -> list[dict[str, str]]:
    """Returns the values of each run; ConfigError if two axes have the same field."""
    read_overrides([f"{path}={text}" for axis in axes for path, text in axis[0].items()])
    return [dict(itertools.chain(*(each.items() for each in chosen))) for chosen in itertools.product(*axes)]


def name_of(point: dict[str, str]) -> str:
    """Returns the name of a run: peak_lr=1e-3,hidden_size=64; with whole paths where the last parts are the same."""
    last = [path.rpartition(".")[2] for path in point]
    short = last if len({*last}) == len(last) else [*point]
    return ",".join(f"{name}={text.replace('/', '_')}" for name, text in zip(short, point.values(), strict=True))
