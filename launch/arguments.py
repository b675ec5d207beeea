"""The commands that only a clone has: they compare the package with other libraries, and run its tests."""

import argparse
from pathlib import Path
from typing import NamedTuple

from jaxinfra.cli.arguments import COMMANDS, Command
from jaxinfra.cli.numbers import add_int
from jaxinfra.cli.shared_arguments import add_processes
from jaxinfra.errors import ConfigError
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage import outputs
from tests.bench import DEFAULT_CONFIG

DEFAULT_PAIRS = 15  # timed rounds of a benchmark
DEFAULT_MEGABYTES = 1000  # of what a benchmark saves, or reads and writes
MIN_TOKENS = 4 * 64 * 1024  # of `bench data`: four of its batches


class BenchmarkSpec(NamedTuple):
    """A benchmark: its summary, its parts in table order, and its options besides --only and --json."""

    summary: str
    parts: tuple[str, ...]
    options: tuple[str, ...] = ("config", "pairs")


BENCHES = {
    "step": BenchmarkSpec(
        summary="the train step, dispatch and startup against a hand-written step of the same model, and PyTorch",
        parts=("float32", "characters", "float32-fsdp8", "bfloat16", "bfloat16-fsdp8", "dispatch", "start"),
        options=("config", "pairs", "against", "processes"),
    ),
    "parallel": BenchmarkSpec(
        summary="the train step on every mesh axis and pipeline schedule, on 8 emulated devices, against fsdp=8",
        parts=("axes", "experts", "schedules"),
    ),
    "canonical": BenchmarkSpec(
        summary="the train step with train.canonical=8 against plain training on the same mesh: time, memory, bytes",
        parts=("fsdp", "replica"),
    ),
    "processes": BenchmarkSpec(
        summary="2 processes with a device each against 1 process with 2: step, start, a killed process, restart",
        parts=("step", "start", "kill"),
    ),
    "slices": BenchmarkSpec(
        summary="the train step on two slices with a slow link between them: bytes over the link, with and without "
        "mesh.replica",
        parts=("replica", "fsdp"),
    ),
    "verdicts": BenchmarkSpec(
        summary="how often `plan --check` names what slows a run down: a link, files, a process, programs",
        parts=("nothing", "link", "write", "read", "rank", "compile"),
        options=("pairs",),
    ),
    "llama": BenchmarkSpec(
        summary="the step of Llama 3.1 8B compiled for 64 TPU v5p chips: memory and cycles, beside other results",
        parts=("full", "dots", "best"),
        options=(),
    ),
    "data": BenchmarkSpec(
        summary="batches of random sequences by jaxinfra, TensorStore, Grain and PyTorch; first batch; memory",
        parts=("speed", "first", "memory"),
        options=("pairs", "tokens"),
    ),
    "checkpoint": BenchmarkSpec(
        summary="saving and restoring a state of 1 GB by jaxinfra, plain Orbax, TensorStore and raw writes",
        parts=("jaxinfra", "compress", "copy", "orbax", "tensorstore", "raw"),
        options=("pairs", "megabytes"),
    ),
    "memory": BenchmarkSpec(
        summary="host memory of a save and of a restore, on a disk and in a bucket, in 1, 2 and 4 processes",
        parts=("disk", "bucket"),
        options=("megabytes",),
    ),
    "mixture": BenchmarkSpec(
        summary="a mixture of 40 sources in 8 processes, beside one source: threads, files, memory, requests, time",
        parts=("disk", "bucket"),
        options=("pairs",),
    ),
    "hub": BenchmarkSpec(
        summary="published weights of 1 GB read onto a device and written, against raw reads and writes",
        parts=("read", "write"),
        options=("pairs", "megabytes"),
    ),
    "sample": BenchmarkSpec(
        summary="tokens a second of greedy sampling beside transformers, and of rows that take the next prompt",
        parts=("batch-1", "batch-8", "batch-32", "refill"),
        options=("pairs",),
    ),
    "prepare": BenchmarkSpec(
        summary="tokenization by data prepare and by datasets.map, with one worker and two",
        parts=("prepare", "map"),
        options=("pairs", "text"),
    ),
    "accelerator": BenchmarkSpec(
        summary="what these devices do, in ten minutes and one file: collectives, kernels, saving, parity, train steps "
        "and MFU; tiny on a CPU",
        parts=("environment", "collectives", "kernels", "save", "parity", "models"),
        options=("devices", "folder", "pairs", "processes"),
    ),
}
"""Benchmarks by name: the modules of `tests.bench`."""


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bench`."""
    parser.add_argument("name", choices=BENCHES, help="; ".join(f"{n}: {b.summary}" for n, b in BENCHES.items()))
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="overrides of the config, before options")
    parser.add_argument("--config", help=f"the model to time (default {DEFAULT_CONFIG})")
    add_int(parser, "--pairs", 1, help=f"timed rounds (default {DEFAULT_PAIRS})")
    add_int(parser, "--tokens", MIN_TOKENS, help="data: tokens in the store (default 200 million)")
    what = f"checkpoint, hub, memory: size of the state or weights (default {DEFAULT_MEGABYTES})"
    add_int(parser, "--megabytes", 1, help=what)
    parser.add_argument("--text", help="prepare: folder of text files (default: Python's standard library)")
    what = "accelerator: save there, in a folder or bucket that all hosts share (default: a temporary folder)"
    parser.add_argument("--folder", metavar="DIR", help=what)
    parts = "; ".join(f"{name}: {', '.join(bench.parts)}" for name, bench in BENCHES.items())
    parser.add_argument("--only", action="append", metavar="PART", help=f"measure this part; repeatable ({parts})")
    parser.add_argument("--json", metavar="OUT", help="also write the table as JSON, to a file or URL")
    script = "step: also time this script of a hand-written step; it takes --devices, --fsdp and --dtype, "
    script += "and prints JSON with median_step_ms"
    parser.add_argument("--against", type=Path, metavar="SCRIPT", help=script)
    add_processes(parser)


def check_bench(options: argparse.Namespace) -> None:
    """Raises ConfigError for parts and options of other benchmarks, StorageError if --json cannot be written."""
    name, bench, peers = options.name, BENCHES[options.name], current_peers()
    count = max(peers.count, options.processes)
    if count > 1 and "processes" not in bench.options:
        raise ConfigError(f"bench {name}: runs in one process, found {count}; start it once, without --processes")
    for part in options.only or ():
        if part not in bench.parts:
            raise ConfigError(f"--only {part}: bench {name} has no such part; use one of {', '.join(bench.parts)}")
    allowed = (*bench.options, *(["devices"] if count > 1 else []))  # each process has its share of them
    for option in ("config", "pairs", "against", "devices", "tokens", "megabytes", "text", "folder"):
        value = getattr(options, option)
        if value is not None and option not in allowed:
            raise ConfigError(f"--{option} {value}: bench {name} does not take it; leave it out")
    if options.against is not None and not options.against.is_file():
        raise ConfigError(f"--against {options.against}: no such file; name a script")
    if peers.index == 0:
        outputs.check_writable(options.json)


def add_faults(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `faults`."""
    parser.set_defaults(devices="cpu:8")  # to restore on other meshes
    parser.add_argument("--only", metavar="ROWS", help="rows of the matrix, such as 19,20 (default: all)")
    what = "try the larger numbers of random places and moments, and longer outages: 25 minutes"
    parser.add_argument("--long", action="store_true", help=what)
    add_int(parser, "--soak", 1, metavar="N", help="inject N random faults in row 41 (default 3)")
    add_int(parser, "--seed", 0, metavar="N", help="of these (default: the time)")
    parser.add_argument("--keep", metavar="DIR", help="run in this new folder and keep it")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="insert the table into this Markdown page")


def add_commands() -> None:
    """Adds these commands to those of the package."""
    summary = "time the framework against hand-written code and other libraries"
    COMMANDS["bench"] = Command(add_bench, summary, "launch.bench", check_bench)
    summary = "inject the fault matrix into small real runs on this machine, and show what happens"
    COMMANDS["faults"] = Command(add_faults, summary, "launch.faults")
