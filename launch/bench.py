"""`python -m launch bench NAME`: compares the framework with hand-written code and other libraries."""

import argparse
import importlib
import sys

from jaxinfra.storage import outputs
from launch.arguments import DEFAULT_MEGABYTES, DEFAULT_PAIRS, check_bench
from tests.bench import DEFAULT_CONFIG
from tests.bench.table import run_cases


def run(options: argparse.Namespace) -> None:
    """Runs the benchmark and prints its table."""
    check_bench(options)
    options.config, options.pairs = options.config or DEFAULT_CONFIG, options.pairs or DEFAULT_PAIRS
    options.megabytes = options.megabytes or DEFAULT_MEGABYTES
    bench = importlib.import_module(f"tests.bench.{options.name}")
    if "jax" in sys.modules:  # not yet when this command began
        importlib.import_module("jaxinfra.machine.checked_programs").use_cache()
    if hasattr(bench, "run"):
        result = bench.run(options)
    else:
        result = run_cases(options, bench.CASES, bench.COLUMNS, getattr(bench, "NOTE", ""))
    if options.prints:
        print(result)
        outputs.write_json(options.json, {**result.measurements, "environment": result.environment})
