"""`python -m launch bench NAME`: compares the framework with hand-written code."""

import argparse
import importlib
import sys

from jaxinfra.bench import DEFAULT_CONFIG
from jaxinfra.bench.table import run_cases
from jaxinfra.cli.arguments import BENCHES, DEFAULT_MEGABYTES, DEFAULT_PAIRS
from jaxinfra.errors import ConfigError
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage import outputs


def run(options: argparse.Namespace) -> None:
    """Runs the benchmark and prints its table."""
    check_options(options)
    options.config, options.pairs = options.config or DEFAULT_CONFIG, options.pairs or DEFAULT_PAIRS
    options.megabytes = options.megabytes or DEFAULT_MEGABYTES
    bench = importlib.import_module(f"{BENCHES[options.name].package}.{options.name}")
    if "jax" in sys.modules:  # not yet when this command began
        importlib.import_module("jaxinfra.machine.checked_programs").use_cache()
    if hasattr(bench, "run"):
        result = bench.run(options)
    else:
        result = run_cases(options, bench.CASES, bench.COLUMNS, getattr(bench, "NOTE", ""))
    if options.prints:
        print(result)
        outputs.write_json(options.json, {**result.measurements, "environment": result.environment})


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for parts and options of other benchmarks, StorageError if --json cannot be written."""
    name, bench, peers = options.name, BENCHES[options.name], current_peers()
    count = max(peers.count, options.processes)
    if count > 1 and "processes" not in bench.options:
        raise ConfigError(f"bench {name}: runs in one process, found {count}; start it once, without --processes")
    for part in options.only or ():
        if part not in bench.parts:
            raise ConfigError(f"--only {part}: bench {name} has no such part; use one of {', '.join(bench.parts)}")
    allowed = (*bench.options, *(["devices"] if count > 1 else []))  # each process has its share of them
    for option in ("config", "pairs", "against", "devices", "tokens", "megabytes", "text"):
        value = getattr(options, option)
        if value is not None and option not in allowed:
            raise ConfigError(f"--{option} {value}: bench {name} does not take it; leave it out")
    if options.against is not None and not options.against.is_file():
        raise ConfigError(f"--against {options.against}: no such file; name a script")
    if peers.index == 0:
        outputs.check_writable(options.json)
