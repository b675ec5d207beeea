"""`python -m launch bench NAME`: timings of the framework against hand-written code, in turns."""

import argparse
import importlib
from collections.abc import Sequence

BENCHES = {"step": "the train step, dispatch and start against a bare JAX loop of the same model"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which benchmark; each adds its own options."""
    parser.add_argument("name", choices=BENCHES, help="; ".join(f"{n}: {s}" for n, s in BENCHES.items()))
    parser.add_argument("--pairs", type=int, default=15, help="timed turns of each side (default %(default)s)")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the benchmark and prints its table."""
    return importlib.import_module(f"launch.bench.{options.name}").run(options)
