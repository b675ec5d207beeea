"""The commands, what each does, and its arguments.

It imports nothing heavy: `--help` and a mistake on the command line are answered at once. The module of a command
is imported when it is run.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfra.bench import DEFAULT_CONFIG, PARITY_CONFIGS
from jaxinfra.errors import ConfigError

CONFIG_HELP = "a config file, or the run.json of a run"
ENGINES = ("local", "ray", "dask", "spark")  # engines that run the workers of `data prepare`; the first is the default
DEFAULT_PAIRS = 15  # timed rounds of a benchmark


@dataclass(frozen=True, kw_only=True)
class BenchmarkSpec:
    """A benchmark: what it says, its parts in the order of its table, and its own options besides --only and --json."""

    summary: str
    parts: tuple[str, ...]
    options: tuple[str, ...]


BENCHES = {
    "step": BenchmarkSpec(
        summary="the train step, dispatch and start against a hand-written step of the same model",
        parts=("float32", "float32-fsdp8", "bfloat16", "bfloat16-fsdp8", "dispatch", "start"),
        options=("config", "pairs", "against"),
    ),
    "parallel": BenchmarkSpec(
        summary="the train step on every mesh axis and pipeline schedule, on 8 emulated devices, against fsdp=8",
        parts=("axes", "experts", "schedules"),
        options=("config", "pairs"),
    ),
    "llama": BenchmarkSpec(
        summary="the step of Llama 3.1 8B, compiled for 64 TPU v5p chips: memory and cycles beside those of others",
        parts=("full", "dots", "best"),
        options=(),
    ),
    "data": BenchmarkSpec(
        summary="batches of random windows by our loader, TensorStore alone, Grain and PyTorch; first batch; memory",
        parts=("speed", "first", "memory"),
        options=("pairs", "tokens"),
    ),
    "prepare": BenchmarkSpec(
        summary="tokens from text, by data prepare and by datasets.map, with one worker and two",
        parts=("prepare", "map"),
        options=("pairs", "text"),
    ),
}


def _add_int(parser: argparse._ActionsContainer, option: str, least: int, **settings: Any) -> None:
    """Adds an option that takes a whole number; one below `least` is a ConfigError."""

    def read(text: str) -> int:
        if (value := int(text)) < least:
            raise ConfigError(f"{option} {value}: expected {least} or more; use {option} {least}")
        return value

    read.__name__ = "int"  # as argparse names it where the text is no number
    parser.add_argument(option, type=read, **settings)


def _add_config(parser: argparse.ArgumentParser, what: str = CONFIG_HELP) -> None:
    parser.add_argument("config", metavar="CONFIG", help=what)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to it, such as train.steps=400")
    _add_imports(parser)


def _add_imports(parser: argparse.ArgumentParser) -> None:
    what = "let a run.json use the classes of this module, or of this file and its folder; may be repeated"
    parser.add_argument("--import", dest="imports", metavar="MODULE|FILE", action="append", default=[], help=what)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of a store, or of one of its versions")
    parser.add_argument("--version", metavar="FINGERPRINT", help="the version, or its beginning (default: the newest)")


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="where to write (default: here)")


def _add_compile(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    examples = "v5p:4x4x4 (a slice of TPUs), 2xv5e:2x4 (two slices), h100:2x8 (hosts x GPUs)"
    parser.add_argument("--on", metavar="TOPOLOGY", required=True, help=examples)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    parser.add_argument("--dump", metavar="FILE", type=Path, help="write the compiled program's text")


def _add_data_prepare(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "a recipe such as configs/data/python_stdlib.py, or a run that names its recipes")
    parser.add_argument("--engine", choices=ENGINES, help=f"what runs the workers (default {ENGINES[0]})")
    _add_int(parser, "--workers", 1, metavar="N", help="so many at once (default: one a core)")
    follow = parser.add_argument_group("streams")
    follow.add_argument("--follow", action="store_true", help="read a stream (Stdin, Kafka) as it comes, up to its end")
    follow.add_argument("--until-idle", type=float, metavar="S", help="end when nothing has come for S seconds")
    _add_int(follow, "--seal-every", 1, metavar="N", help="make a version of every N tokens that come, too")


def _add_data_show(parser: argparse.ArgumentParser) -> None:
    _add_store(parser)
    _add_int(parser, "--samples", 0, default=2, help="documents to show of each split (default %(default)s)")
    _add_int(parser, "--chars", 0, default=300, help="of each (default %(default)s)")


def _add_data_peek(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "a run, or a file whose config() returns its data alone")
    _add_int(parser, "--step", 0, default=0, help="counted from 0 (default %(default)s)")
    _add_int(parser, "--rank", 0, default=0, help="of the process, from 0 (default %(default)s)")
    _add_int(parser, "--of", 1, default=1, metavar="PROCESSES", help="how many there are (default 1)")
    parser.add_argument("--global-batch", type=int, metavar="N", help="rows of a step, where CONFIG is data alone")
    _add_int(parser, "--rows", 0, help="show so many (default: all)")
    _add_int(parser, "--chars", 0, default=200, help="of the text of a row (default %(default)s)")


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from")
    _add_int(parser, "--max-tokens", 1, default=200, help="stop after so many (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many; 0 is all (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="and from this share of probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    _add_imports(parser)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", metavar="A", help="a config file or run.json")
    parser.add_argument("right", metavar="B", help="a config file or run.json")
    _add_imports(parser)


def _add_parity(parser: argparse.ArgumentParser) -> None:
    what = f"models (default {', '.join(PARITY_CONFIGS)}) and changes"
    parser.add_argument("words", metavar="CONFIG or KEY=VALUE", nargs="*", help=what)
    _add_int(parser, "--jobs", 1, default=os.cpu_count(), help="processes that share the meshes")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=BENCHES, help="; ".join(f"{n}: {b.summary}" for n, b in BENCHES.items()))
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to the config, before options")
    parser.add_argument("--config", help=f"the model to time (default {DEFAULT_CONFIG})")
    _add_int(parser, "--pairs", 1, help=f"timed rounds (default {DEFAULT_PAIRS})")
    parser.add_argument("--tokens", type=int, help="data: tokens of the store that is read (default 200 million)")
    parser.add_argument("--text", help="prepare: folder of the text files (default: Python's standard library)")
    parts = "; ".join(f"{name}: {', '.join(bench.parts)}" for name, bench in BENCHES.items())
    parser.add_argument("--only", action="append", metavar="PART", help=f"measure this part; may be repeated ({parts})")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table as JSON, too")
    script = "step: also time this script of a hand-written step: it takes --devices, --fsdp and --dtype, "
    script += "and prints a line of JSON with median_step_ms"
    parser.add_argument("--against", type=Path, metavar="SCRIPT", help=script)


_COMMANDS: tuple[tuple[str, Callable[[argparse.ArgumentParser], None], str], ...] = (
    ("train", _add_config, "train CONFIG, or go on from its last checkpoint (the default: the word may be left out)"),
    ("init", _add_init, "write the quickstart's config and the recipe of its data into a folder"),
    ("show", _add_config, "print the resolved config and every number that follows from it; no device is touched"),
    ("compile", _add_compile, "compile the train step for hardware that is not here: memory, cycles, collectives"),
    ("data prepare", _add_data_prepare, "tokenize a corpus into a store, in parallel; goes on where it was stopped"),
    ("data show", _add_data_show, "what a store holds: counts, lengths, versions, samples"),
    ("data verify", _add_store, "read all of a store, and compare every block with its hash"),
    ("data peek", _add_data_peek, "exactly what a process of a run is fed at a step"),
    ("sample", _add_sample, "continue a text with the newest checkpoint of a run, streamed as it is decoded"),
    ("diff", _add_diff, "compare two configs or run records"),
    ("parity", _add_parity, "compare loss and gradients on every mesh with those of one device"),
    ("bench", _add_bench, "time the framework against hand-written code"),
)
COMMANDS = {name: summary for name, _, summary in _COMMANDS}
ARGUMENTS = {name: add for name, add, _ in _COMMANDS}
