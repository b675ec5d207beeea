"""`python -m launch bench verdicts`: slows runs down in known ways, and counts how often `plan --check` names the way.

A run has one process, or two, each on a host of its own (`slow_link`). Its plan is measured on one that nothing slows.
What slows the others down is real: packets that are late, files that are written slowly (strace delays the system
calls), other work on the core of one host, a reader that compiles a new program for each batch. Of two hosts each has a
core of its own.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
NOTE = "Runs of one process (write, read), or of two on hosts that are network namespaces"
_BITS_PER_S = 10e9
_WRITES, _READS = "fsync,fdatasync", "pread64"  # system calls
_TEXTS, _TEXT_BYTES = 64, 1_000_000  # so many that rows lie in blocks that were not read before
STEPS = 106  # of a run, in which its devices are measured three times
_WORDS = (
    "train.global_batch=16",
    "train.eval_every=none",
    "data.seq_len=256",
    "mesh.replica=-1",
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
_RIVAL = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
_RECIPE = """\
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import Bytes


def config() -> Corpus:
    return Corpus(
        store={store!r},
        source=TextFiles(root={texts!r}, pattern="*.txt"),
        tokenizer=Bytes(),
        validation=ByKey(fraction=0.2),
    )
"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to slow a run down, and the words of the verdict that name it.

    Attributes:
        words: what the verdict has.
        link_delay_s: by which packets between the hosts are late.
        delayed: system calls that take longer, by `delay_s`; of a run of one host.
        delay_s: of each of these.
        hosts: of one process each.
        rivals: processes that compute without end on the core of the last host.
        recompiles: whether the reader compiles a program for each batch.
    """

    words: str
    link_delay_s: float = 0.0
    delayed: str = ""
    delay_s: float = 0.0
    hosts: int = 1
    rivals: int = 0
    recompiles: bool = False

    def prefix(self, host: int) -> Sequence[str]:
        """Returns the command before that of a run.

        Each of several hosts has a core of its own. One host is watched by strace, which itself takes time, also while
        its plan is measured.
        """
        if self.hosts > 1:
            return ("taskset", "-c", _core(host))
        delay = ("-e", f"inject={self.delayed}:delay_enter={round(1e6 * self.delay_s)}") if self.delayed else ()
        calls = ("-e", f"trace={_WRITES},{_READS}")
        return ("strace", "-f", "--seccomp-bpf", "-qqq", "-o", "/dev/null", *calls, *delay)


def _core(host: int) -> str:
    cores = _cores()
    return str(cores[host % len(cores)])


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


_PLANS = {hosts: Way(words="as planned", hosts=hosts) for hosts in (1, 2)}
"""The runs that plans are measured on, by number of hosts."""
WAYS = {
    "nothing": _PLANS[2],
    "link": Way(words="or the links between processes, take", link_delay_s=0.005, hosts=2),
    "write": Way(words="saves stall it", delayed=_WRITES, delay_s=0.05),
    "read": Way(words="waiting for data takes", delayed=_READS, delay_s=0.1),
    "rank": Way(words="process 1", hosts=2, rivals=2),
    "compile": Way(words="compiled in each", hosts=2, recompiles=True),
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


class Trials:
    """Runs in a folder that are slow in some way."""

    def __init__(self, folder: Path) -> None:
        self._harness, self._number = Harness(folder), 0
        recipe, texts, random = folder / "recipe.py", folder / "texts", np.random.default_rng(0)
        texts.mkdir()
        for number in range(_TEXTS):
            (texts / f"{number}.txt").write_bytes(random.integers(ord("a"), ord("z"), _TEXT_BYTES, np.uint8).tobytes())
        recipe.write_text(_RECIPE.format(store=str(self._harness.store), texts=str(texts)))
        ended = self._harness.launch("data", "prepare", str(recipe), "--workers", "1")
        require(ended.code == 0, ended)

    def plan(self, hosts: int) -> str:
        """Trains a run that nothing slows down; returns the file of the plan that is measured on it."""
        path = str(self._harness.folder / f"plan-{hosts}.json")
        with self._trained(_PLANS[hosts]) as location:
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
        several = [f"--coordinator={address_of(0)}:8476", f"--of={way.hosts}"] if way.hosts > 1 else []
        env = {SECRET: new_secret()} if several else {}
        words = (f"train.steps={STEPS}", *_WORDS)
        with ExitStack() as stack:
            start = None
            if several:
                link = stack.enter_context(SlowLink(delay_s=way.link_delay_s, bits_per_s=_BITS_PER_S))
                start = link.start
            for _ in range(way.rivals):
                command = ["taskset", "-c", _core(way.hosts - 1), sys.executable, "-c", _RIVAL]
                rival = subprocess.Popen(command, start_new_session=True)  # it gets no interrupt of its own
                stack.callback(rival.wait)
                stack.callback(rival.kill)
            children = []
            for index in range(way.hosts):
                where = [*several, f"--process-id={index}"] if several else []
                options = {"config": config, "prefix": way.prefix(index), "env": env, "start": start}
                children.append(stack.enter_context(harness.started(name, *words, *where, **options)))
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
    if any(way.hosts == 1 for way in ways.values()) and shutil.which("strace") is None:
        raise ConfigError("bench verdicts: needs strace, to slow system calls down; install it, or use --only link")
    if any(way.hosts > 1 for way in ways.values()) and (shutil.which("taskset") is None or len(_cores()) == 1):
        raise ConfigError("bench verdicts: needs taskset and a core for each of two hosts; use --only write read")
    verdicts: dict[str, list[str]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="jaxinfra-verdicts-", ignore_cleanup_errors=True) as folder:
        trials = Trials(Path(folder))
        for number in range(options.pairs):
            where = f"round {number + 1} of {options.pairs}"
            print(f"{where}: measuring what the plans are made of", file=sys.stderr, flush=True)
            plans = {hosts: trials.plan(hosts) for hosts in sorted({way.hosts for way in ways.values()})}
            for name, way in ways.items():
                verdicts[name].append(trials.verdict(way, plans[way.hosts]))
                print(f"{where}: {name}: {_without_paths(verdicts[name][-1])}", file=sys.stderr, flush=True)
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
