"""`python -m launch bench NAME`: the framework against hand-written code, timed in turns or compiled."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

BENCHES = {
    "step": "the train step, dispatch and start against a bare JAX loop of the same model",
    "parallel": "the train step on every mesh axis and pipeline schedule, on 8 emulated devices, against fsdp=8",
    "llama": "the step of Llama 3.1 8B, compiled for 64 TPU v5p chips: temporaries and cycles beside those of others",
}
CASES = {
    "step": ("float32", "float32-fsdp8", "bfloat16", "bfloat16-fsdp8", "dispatch", "start"),
    "parallel": ("axes", "experts", "schedules"),
    "llama": ("full", "dots", "best"),
}
"""The parts of each benchmark, in the order of its table."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which benchmark, how exactly, and on which model."""
    parser.add_argument("name", choices=BENCHES, help="; ".join(f"{n}: {s}" for n, s in BENCHES.items()))
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to the config, before options")
    parser.add_argument("--config", default="configs/bench_small.py", help="the model to time (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="timed turns of each side (default %(default)s)")
    parts = "; ".join(f"{name}: {', '.join(cases)}" for name, cases in CASES.items())
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
        ConfigError: it has no such part.
    """
    from jaxinfra.errors import ConfigError

    parts = CASES[options.name]
    for part in options.only or ():
        if part not in parts:
            raise ConfigError(f"--only {part}: no part of bench {options.name}; use one of {', '.join(parts)}")
    return importlib.import_module(f"launch.bench.{options.name}").run(options)
