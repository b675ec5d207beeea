"""`python -m launch bench verdicts`: slows runs down in known ways, and counts how often `plan --check` names the way.

A run has two processes, each on a host of its own (`slow_link`). Its plan is measured on one that nothing slows down.
What slows the others down is real: packets that are late, system calls on files that take longer (strace), a process
that is stopped for half of the time, a reader that compiles a new program for each batch.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import override

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.data.interfaces import Batch
from jaxinfra.data.tokens import TokenData, TokenDataset
from jaxinfra.errors import ConfigError
from jaxinfra.processes.door import SECRET, new_secret
from jaxinfra.run import Run
from tests.bench.slow_link import SlowLink, address_of
from tests.bench.table import BenchmarkResult, Columns, TableRow, format_table
from tests.faults import config as faults
from tests.faults.harness import Harness, require, wait

COLUMNS: Columns = {
    "case": ("slowed down by", ""),
    "named": ("named in", "{:.0f}"),
    "of": ("of", "{:.0f}"),
    "verdict": ("the last verdict", ""),
}
NOTE = "Each run on two hosts of one process, which are network namespaces"
_BITS_PER_S = 10e9
_STOPPED_S = 0.05  # of twice as much
_STEPS = 106
_WORDS = (
    f"train.steps={_STEPS}",
    "train.global_batch=16",
    "train.eval_every=none",
    "data.seq_len=256",
    "mesh.replica=2",
    "mesh.fsdp=1",
    "checkpoint.save_every=20",
    "checkpoint.keep_last=2",
    "track.log_every=5",
)
_CONFIG = """\
from jaxinfra.run import Run
from tests.bench import verdicts


def config() -> Run:
    return verdicts.config(recompiles={recompiles})
"""
_RECIPE = """\
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import Bytes


def config() -> Corpus:
    return Corpus(
        store={store!r},
        source=TextFiles(root="stdlib", pattern="[a-d]*.py"),
        tokenizer=Bytes(),
        validation=ByKey(fraction=0.2),
    )
"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What slows a run down, and the words of the verdict that name it.

    Attributes:
        words: what the verdict has.
        link_delay_s: by which packets between the hosts are late.
        traced: system calls that take longer, by `delay_s`; reads only those on files of the store.
        delay_s: of each of these.
        stops: whether process 1 is stopped for half of the time.
        recompiles: whether the reader compiles a program for each batch.
    """

    words: str
    link_delay_s: float = 0.0
    traced: str = ""
    delay_s: float = 0.0
    stops: bool = False
    recompiles: bool = False

    def prefix(self, store: Path) -> Sequence[str]:
        """Returns the command before that of a run: strace, if system calls take longer."""
        if not self.traced:
            return ()
        delay = f"inject={self.traced}:delay_enter={round(1e6 * self.delay_s)}"
        reads = "read" in self.traced
        paths = [word for path in store.rglob("*") if path.is_file() and reads for word in ("-P", str(path))]
        quiet = ("-qqq", "-o", "/dev/null")
        return ("strace", "-f", "--seccomp-bpf", *quiet, "-e", f"trace={self.traced}", "-e", delay, *paths)


SOUND = Way(words="as planned")
WAYS = {
    "nothing": SOUND,
    "link": Way(words="or the links between processes, take", link_delay_s=0.02),
    "read": Way(words="waiting for data takes", traced="pread64", delay_s=0.05),
    "write": Way(words="saves stall it", traced="fsync,fdatasync", delay_s=0.02),
    "process": Way(words="process 1 is slow", stops=True),
    "compile": Way(words="programs are compiled in each", recompiles=True),
}
"""The ways, by names."""


def config(*, recompiles: bool = False) -> Run:
    """Returns the run."""
    run = faults.config()
    return replace(run, data=RecompiledTokens(store="store", seq_len=256)) if recompiles else run


@dataclass(frozen=True, kw_only=True)
class RecompiledTokens(TokenData):
    """Tokens whose reader traces a new function for each batch: JAX compiles it again, although nothing changes."""

    @override
    def open(self, *, section: str = "data", hint: str = "") -> TokenDataset:
        dataset = super().open(section=section, hint=hint)
        read = dataset.train.read

        def read_and_compile(ids: np.ndarray, *, weighted: bool) -> Batch:
            batch = read(ids, weighted=weighted)
            factor = float(ids[0])
            jax.block_until_ready(jax.jit(lambda x: jnp.linalg.qr(x * factor))(jnp.ones((16, 16))))
            return batch

        dataset.train.read = read_and_compile
        return dataset


@contextmanager
def _stopped_half_of_the_time(pid: int) -> Iterator[None]:
    """Stops a process again and again, and lets it go on."""
    ended = threading.Event()

    def stop() -> None:
        with suppress(ProcessLookupError):  # it has ended
            while not ended.wait(_STOPPED_S):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(_STOPPED_S)
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop, name="stops")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Trials:
    """Runs in a folder that are slow in some way."""

    def __init__(self, folder: Path) -> None:
        self._harness, self._number, recipe = Harness(folder), 0, folder / "recipe.py"
        recipe.write_text(_RECIPE.format(store=str(self._harness.store)))
        ended = self._harness.launch("data", "prepare", str(recipe), "--workers", "1")
        require(ended.code == 0, ended)

    def plan(self) -> str:
        """Trains a run that nothing slows down; returns the file of the plan that is measured on it."""
        path = str(self._harness.folder / "plan.json")
        with self._trained(SOUND) as location:
            ended = self._harness.launch("plan", "--fit", location, "--json", path)
        require(ended.code == 0, ended)
        return path

    def verdict(self, way: Way, plan: str) -> str:
        """Trains a run that is slow in a way; returns what `plan --check` says of it."""
        with self._trained(way) as location:
            ended = self._harness.launch("plan", "--check", location, "--plan", plan)
        require(ended.code == 0, ended)
        return ended.out.strip().splitlines()[-1].partition(": ")[2]

    @contextmanager
    def _trained(self, way: Way) -> Iterator[str]:
        """Trains a run on both hosts, and yields its location; it is deleted afterwards."""
        self._number += 1
        name, harness = f"run-{self._number}", self._harness
        config = harness.folder / f"config-{way.recompiles}.py"
        config.write_text(_CONFIG.format(recompiles=way.recompiles))
        where = f"--coordinator={address_of(0)}:8476", "--of=2"
        with SlowLink(delay_s=way.link_delay_s, bits_per_s=_BITS_PER_S) as link, ExitStack() as stack:
            options = {
                "config": config,
                "prefix": way.prefix(harness.store),
                "env": {SECRET: new_secret()},
                "start": link.start,
            }
            children = [
                stack.enter_context(harness.started(name, *_WORDS, *where, f"--process-id={index}", **options))
                for index in (0, 1)
            ]
            if way.stops:
                stack.enter_context(_stopped_half_of_the_time(children[1].pid))
            for ended in [*map(wait, children)]:
                require(ended.code == 0, ended)
        location = harness.run(name).location
        try:
            yield location
        finally:
            shutil.rmtree(location)


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Judges runs of each way in turns, each by a plan that was measured a moment before."""
    if options.overrides:
        raise ConfigError(f"bench verdicts: {options.overrides[0]}: has a run of its own; leave overrides out")
    ways = {name: WAYS[name] for name in options.only or WAYS}
    if any(way.traced for way in ways.values()) and shutil.which("strace") is None:
        raise ConfigError("bench verdicts: needs strace, to slow system calls down; install it, or use --only link")
    verdicts: dict[str, list[str]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="jaxinfra-verdicts-", ignore_cleanup_errors=True) as folder:
        trials = Trials(Path(folder))
        for number in range(options.pairs):
            plan = trials.plan()
            for name, way in ways.items():
                verdicts[name].append(trials.verdict(way, plan))
            print(f"round {number + 1} of {options.pairs}", file=sys.stderr, flush=True)
    rows: list[TableRow] = [
        {
            "case": name,
            "named": sum(ways[name].words in verdict for verdict in said),
            "of": len(said),
            "verdict": _without_paths(said[-1]),
        }
        for name, said in verdicts.items()
    ]
    return BenchmarkResult(
        text=format_table(COLUMNS, rows), note=NOTE, measurements={"rows": rows, "verdicts": verdicts}
    )


def _without_paths(verdict: str) -> str:
    return re.sub(r" \([^)]*runs/run-\d+\)", "", verdict)
