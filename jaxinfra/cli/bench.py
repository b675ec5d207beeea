"""`python -m launch bench NAME`: the framework against hand-written code, timed in turns or compiled."""

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfra.bench import CONFIG
from jaxinfra.cli.config_argument import add_number
from jaxinfra.errors import ConfigError
from jaxinfra.storage import outputs


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark.

    Attributes:
        summary: what it says.
        parts: of it, in the order of its table.
        options: of the command line that it has a use for, besides --only, --json and changes to the config.
    """

    summary: str
    parts: tuple[str, ...]
    options: tuple[str, ...]


BENCHES = {
    "step": Bench(
        summary="the train step, dispatch and start against a bare JAX loop of the same model",
        parts=("float32", "float32-fsdp8", "bfloat16", "bfloat16-fsdp8", "dispatch", "start"),
        options=("config", "pairs", "against"),
    ),
    "parallel": Bench(
        summary="the train step on every mesh axis and pipeline schedule, on 8 emulated devices, against fsdp=8",
        parts=("axes", "experts", "schedules"),
        options=("config", "pairs"),
    ),
    "llama": Bench(
        summary="the step of Llama 3.1 8B, compiled for 64 TPU v5p chips: memory and cycles beside those of others",
        parts=("full", "dots", "best"),
        options=(),
    ),
    "data": Bench(
        summary="batches of random windows by our loader, TensorStore alone, Grain and PyTorch; first batch; memory",
        parts=("speed", "first", "memory"),
        options=("pairs", "tokens"),
    ),
    "prepare": Bench(
        summary="tokens from text, by data prepare and by datasets.map, with one worker and two",
        parts=("prepare", "map"),
        options=("pairs", "text"),
    ),
}
PAIRS = 15


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which benchmark, how exactly, and on which model."""
    parser.add_argument("name", choices=BENCHES, help="; ".join(f"{n}: {b.summary}" for n, b in BENCHES.items()))
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to the config, before options")
    parser.add_argument("--config", help=f"the model to time (default {CONFIG})")
    add_number(parser, "--pairs", 1, help=f"timed turns of each side (default {PAIRS})")
    parser.add_argument("--tokens", type=int, help="data: tokens of the store that is read (default 200 million)")
    parser.add_argument("--text", help="prepare: folder of the text files (default: Python's standard library)")
    parts = "; ".join(f"{name}: {', '.join(bench.parts)}" for name, bench in BENCHES.items())
    parser.add_argument("--only", action="append", metavar="PART", help=f"measure this part; may be repeated ({parts})")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table as JSON, too")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="SCRIPT",
        help="step: time this script of a bare step as well: it takes --devices, --fsdp and --dtype, "
        "and prints a line of JSON with median_step_ms",
    )


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the benchmark and prints its table.

    Raises:
        ConfigError: it has no such part, or no use for an option.
        StorageError: there is no place for the table.
    """
    check(options)
    options.config, options.pairs = options.config or CONFIG, options.pairs or PAIRS
    found = importlib.import_module(f"jaxinfra.bench.{options.name}").run(options)
    print(found)
    if options.json is not None:
        outputs.write(options.json, json.dumps({**found.figures, "facts": found.facts}, indent=2) + "\n")
    return 0


def check(options: argparse.Namespace) -> None:
    """Refuses, before anything is measured, what would not be measured or could not be written."""
    name, bench = options.name, BENCHES[options.name]
    for part in options.only or ():
        if part not in bench.parts:
            raise ConfigError(f"--only {part}: no part of bench {name}; use one of {', '.join(bench.parts)}")
    for option in ("config", "pairs", "against", "devices", "tokens", "text"):
        value = getattr(options, option)
        if value is not None and option not in bench.options:
            raise ConfigError(f"--{option} {value}: bench {name} has no use for it; leave it out")
    if options.against is not None and not options.against.is_file():
        raise ConfigError(f"--against {options.against}: no such script")
    if options.json is not None:
        outputs.check(options.json)
