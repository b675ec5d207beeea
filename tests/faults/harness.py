"""Trains the run of the fault matrix in real processes, and compares it with the one that nothing happened to.

`Harness.reference` is that run: its losses to the last bit, the SHA-256 of the state in each checkpoint, and the
samples of each step. A run survives a fault if all of it is the same (`Harness.same_bits`).
"""

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfra.checkpoint.inventory import stored_checkpoints
from jaxinfra.config import read_record
from jaxinfra.config.source import RECORD_FILE
from jaxinfra.errors import JaxinfraError
from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.attempts import ATTEMPTS_FILE
from jaxinfra.track.goodput import GOODPUT_FILE, Goodput, account, read_ledger
from jaxinfra.track.jsonl import METRICS_FILE
from jaxinfra.track.runs import local_files
from tests.faults.config import READS, STEPS
from tests.servers.bucket import Bucket, emulated_bucket

TIMEOUT_S = 900.0  # of a command on a slow and busy machine
CONFIG_MODULE = "tests.faults.config"
"""The module of the classes in the configs of the runs, which a replay of a record must name."""
_CLONE = str(Path(__file__).parents[2])
_MAIN = "import sys; from jaxinfra.cli.entry import main; sys.exit(main())"
_CONFIG = """\
from dataclasses import replace

from tests.faults import config as base
from jaxinfra.run import Run


def config() -> Run:
    return {run}
"""
_RECIPE = """\
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import Bytes


def config() -> Corpus:
    return Corpus(
        store={store!r},
        source=TextFiles(root={text!r}, pattern="*.txt"),
        tokenizer=Bytes(),
        validation=ByKey(fraction=0.2),
    )
"""


def timeout_of(steps: int) -> float:
    """Returns the seconds after which a run of this number of steps counts as hung."""
    return TIMEOUT_S + steps / 4


type Start = Callable[[Sequence[str], Mapping[str, str]], subprocess.Popen[str]]
"""Starts a command with an environment."""


class NotSurvived(JaxinfraError):
    """A run did not do what it must do after a fault."""


class NotTried(JaxinfraError):
    """This machine lacks what a fault, or a part of it, is injected with; the message says what, and how to get it."""


def require(condition: object, message: object) -> None:
    """Raises NotSurvived unless the condition holds."""
    if not condition:
        raise NotSurvived(str(message))


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"ended with {self.code}; stderr: {self.err[-2000:]}; stdout: {self.out[-500:]}"

    @property
    def error(self) -> str:
        """The one line of its error; NotSurvived if there is none or more, or a traceback."""
        lines = [line for line in self.err.splitlines() if "error: " in line]
        require(len(lines) == 1 and "Traceback" not in self.err, f"expected one line of an error, found: {self.err}")
        return lines[0].partition("error: ")[2]


class Reference(NamedTuple):
    """The numbers that a run must end with.

    Attributes:
        losses: of each step, in hexadecimal.
        states: SHA-256 of the state in each checkpoint, by step.
        samples: of each step, sorted.
    """

    losses: Mapping[int, str]
    states: Mapping[int, str]
    samples: Mapping[int, Sequence[int]]

    def until(self, step: int) -> "Reference":
        """Returns the numbers of the first steps."""
        losses, states = ({at: x for at, x in each.items() if at <= step} for each in (self.losses, self.states))
        return Reference(losses, states, {at: ids for at, ids in self.samples.items() if at <= step})


@dataclass(frozen=True)
class Run:
    """A run in its directory."""

    name: str
    location: str
    reads: Path

    @property
    def path(self) -> Path:
        """Its directory; only if it is not in a bucket."""
        return Path(self.location)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / "checkpoints"

    def steps(self) -> list[int]:
        """Returns the steps of its checkpoints."""
        return stored_checkpoints(self.location).steps()

    def losses(self) -> dict[int, str]:
        """Returns the loss of each step, in hexadecimal; NotSurvived if a step was logged twice."""
        content = ObjectStore(self.location).read_or_none(METRICS_FILE) or b""
        rows = [row for row in map(json.loads, content.splitlines()) if "loss" in row]
        losses = {int(row["step"]): float(row["loss"]).hex() for row in rows}
        require(len(losses) == len(rows), f"{self.name}: a step was logged twice")
        return losses

    def states(self) -> dict[int, str]:
        """Returns the SHA-256 of the state in each checkpoint."""
        stored, found = stored_checkpoints(self.location), {}
        for step in stored.steps():
            manifest, sha = stored.manifest(step), hashlib.sha256()
            for name in sorted(manifest.leaves):
                sha.update(name.encode())
                sha.update(stored.read_leaf(step, manifest, name).tobytes())
            found[step] = sha.hexdigest()
        return found

    def samples(self) -> dict[int, list[int]]:
        """Returns the samples that the processes of a start have read for each step.

        NotSurvived if the processes of a start have read one twice in an epoch, or if two starts have read other ones.
        """
        starts: dict[str, dict[int, list[int]]] = {}
        for path in self.reads.iterdir():
            of_start = starts.setdefault(path.name.partition("-")[0], defaultdict(list))
            for line in path.read_text().splitlines():
                step, *ids = map(int, line.split())
                of_start[step] += ids
        batch, found = self.batch, dict[int, list[int]]()
        # Of an epoch, if the run is that long; of all that was read, otherwise.
        num_samples = len({each for of_start in starts.values() for ids in of_start.values() for each in ids})
        for of_start in starts.values():
            for step, ids in of_start.items():
                epochs = (step * batch - 1) // num_samples - (step - 1) * batch // num_samples + 1
                most = max(Counter(ids).values())
                require(most <= epochs, f"{self.name}: a sample was read {most} times in step {step}: {ids}")
                if len(ids) == batch:  # a start that was killed while it read ahead has read a part
                    require(found.setdefault(step, sorted(ids)) == sorted(ids), f"{self.name}: other samples in {step}")
        return dict(sorted(found.items()))

    @property
    def batch(self) -> int:
        """Samples of a step."""
        with local_files(self.location) as folder:
            return read_record(folder / RECORD_FILE)["config"]["train"]["global_batch"]

    def goodput(self) -> Goodput:
        """Returns what its time went to."""
        with local_files(self.location) as folder:
            return account(read_ledger(folder / GOODPUT_FILE))

    def attempts(self) -> list[dict[str, Any]]:
        """Returns the starts by a supervisor."""
        return [json.loads(line) for line in (self.path / ATTEMPTS_FILE).read_text().splitlines()]

    def result(self) -> Reference:
        """Returns its losses, states and samples."""
        return Reference(self.losses(), self.states(), self.samples())


class Harness:
    """Runs the matrix in a folder.

    Attributes:
        folder: where the data, the configs and the runs are.
        is_long: whether to try the larger numbers of random places and moments.
        soak_events: number of random faults of row 41; 0 takes its small form.
        seed: of these.
    """

    def __init__(self, folder: Path, *, is_long: bool = False, soak_events: int = 0, seed: int = 0) -> None:
        self.folder, self.is_long, self.soak_events, self.seed = folder, is_long, soak_events, seed
        self._layouts: dict[str, tuple[int, int]] = {}  # of each run, at its last start
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    @cached_property
    def config(self) -> Path:
        """The config file; its data is prepared before."""
        path, text = self.folder / "config.py", self.folder / "text"
        with self.once("config") as is_first:
            if is_first:
                _write_text(text)
                recipe = self.folder / "recipe.py"
                recipe.write_text(_RECIPE.format(store=str(self.store), text=str(text)))
                ended = self.launch("data", "prepare", str(recipe), "--workers", "1")
                require(ended.code == 0, ended)
                path.write_text(_CONFIG.format(run="base.config()"))
        return path

    def write_config(self, name: str, run: str) -> Path:
        """Writes a config file whose run is this expression, in which `base` is `faults.config`; returns its path."""
        path = self.folder / f"{name}.py"
        path.write_text(_CONFIG.format(run=run))
        return path

    @property
    def store(self) -> Path:
        """The token store."""
        return self.folder / "store"

    def reference(self, *words: str, processes: int = 1, devices: int = 1, steps: int = STEPS) -> Reference:
        """Trains the run that nothing happens to, once, and returns what it ended as."""
        run = self.reference_run(*words, processes=processes, devices=devices)
        path = self.folder / f"{run.name}.json"
        with self.once(run.name) as is_first:
            if is_first:
                ended = self.train(run.name, *words, processes=processes, devices=devices, timeout_s=timeout_of(steps))
                require(ended.code == 0, ended)
                result = run.result()
                require([*result.losses] == [*range(1, steps + 1)], f"{run.name}: did not log each step")
                path.write_text(json.dumps(result))
        saved = [{int(step): value for step, value in each.items()} for each in json.loads(path.read_text())]
        return Reference(*saved)

    def run(self, name: str) -> Run:
        """Returns a run by name, which need not have begun."""
        reads = self.folder / "reads" / name
        reads.mkdir(parents=True, exist_ok=True)
        return Run(name, str(self.folder / "runs" / name), reads)

    def reference_run(self, *words: str, processes: int = 1, devices: int = 1) -> Run:
        """Returns the run of `reference`."""
        digest = hashlib.sha256(repr(words).encode()).hexdigest()[:8]
        return self.run(f"reference-{processes}x{devices}-{digest}")

    def words(self, name: str, *words: str, config: Path | None = None) -> list[str]:
        """Returns the words of a command that trains a run; later overrides of a field win."""
        given = [f"name={name}", f"root={self.folder / 'runs'}", f"data.store={self.store}"]
        overrides = {word.partition("=")[0]: word for word in [*given, *words] if not word.startswith("-")}
        options = [word for word in words if word.startswith("-")]
        return [str(config or self.config), *overrides.values(), *options]

    @contextmanager
    def started(
        self,
        name: str,
        *words: str,
        processes: int = 1,
        devices: int | None = None,
        fail: str = "",
        env: Mapping[str, str] | None = None,
        config: Path | None = None,
        prefix: Sequence[str] = (),
        start: Start | None = None,
    ) -> Iterator[subprocess.Popen[str]]:
        """Starts to train a run, with `devices` emulated devices in all; nothing of it survives the block.

        `fail` are failpoints, which must act (`require_fired`). `start` starts the command, by default on this host.
        """
        run, devices = self.run(name), devices or processes
        self._layouts[name] = processes, devices
        options = [f"--devices=cpu:{devices}"]
        if processes > 1:
            options.append(f"--processes={processes}")
        fired = self._fired(name)
        shutil.rmtree(fired, ignore_errors=True)
        fired.mkdir(parents=True)
        environment = {READS: str(run.reads), **(env or {})}
        if fail:
            environment |= {"JAXINFRA_FAIL": fail, "JAXINFRA_FAIL_LOG": str(fired)}
        child = self._start([*self.words(name, *words, config=config), *options], environment, prefix, start)
        try:
            yield child
        finally:
            kill_tree(child.pid)
            child.wait()
            for pipe in filter(None, (child.stdout, child.stderr)):
                pipe.close()

    def train(self, name: str, *words: str, timeout_s: float = TIMEOUT_S, **options: Any) -> Ended:
        """Trains a run as `started` starts it, and waits for its end; raises NotSurvived if a failpoint did not act."""
        start_s = time.monotonic()
        with self.started(name, *words, **options) as child:
            ended = wait(child, timeout_s)
        for failpoint in filter(None, options.get("fail", "").split(",")):
            require((self._fired(name) / failpoint).exists(), f"{failpoint} did not act: {ended}")
        return ended._replace(seconds=time.monotonic() - start_s)

    def has_fired(self, name: str, failpoint: str) -> bool:
        """Whether a failpoint of a run has acted."""
        return (self._fired(name) / failpoint).exists()

    def fired_s(self, name: str, failpoint: str) -> float:
        """Returns when a failpoint acted, in seconds since 1970."""
        return (self._fired(name) / failpoint).stat().st_mtime

    def launch(self, *words: str, env: Mapping[str, str] | None = None) -> Ended:
        """Runs a command and waits for its end."""
        start_s = time.monotonic()
        child = self._start(words, env or {})
        return wait(child, TIMEOUT_S)._replace(seconds=time.monotonic() - start_s)

    def same_bits(
        self, name: str, reference: Reference | None = None, *, run: Run | None = None, until: int = sys.maxsize
    ) -> str:
        """Raises NotSurvived unless a run has ended as the reference, by default that of its last layout.

        `run` is given if it is not among those of the harness. Steps after `until` are not compared. Returns words for
        the table.
        """
        processes, devices = self._layouts[name]
        expected = (reference or self.reference(processes=processes, devices=devices)).until(until)
        found = (run or self.run(name)).result().until(until)
        for what, ours, theirs in zip(("loss", "state", "samples"), found, expected, strict=True):
            steps = theirs if what != "state" else [step for step in theirs if step in ours]
            require(steps and max(ours, default=0) == max(theirs), f"{name}: its {what} ends at {max(ours, default=0)}")
            for step in steps:
                require(ours.get(step) == theirs[step], f"{name}: other {what} at step {step}")
        return "same bits"

    def _fired(self, name: str) -> Path:
        return self.folder / "fired" / name

    def _start(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        prefix: Sequence[str] = (),
        start: Start | None = None,
    ) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        command = [*prefix, sys.executable, "-c", _MAIN, *words]
        env = {**inherited, **self.settings(), **environment}
        if start is not None:
            return start(command, env)
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=self.folder, env=env)

    def settings(self) -> dict[str, str]:
        """Returns the environment variables of all runs, by which they compile the same program in the same cache."""
        inherited = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"), **inherited}
        # The config files of the harness import this package.
        settings = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": _CLONE}
        return {name: value for name, value in (cache | settings).items() if name not in _NOT_INHERITED}

    @contextmanager
    def bucket(self) -> Iterator[Bucket]:
        """Runs an object store; this process finds it, too."""
        with emulated_bucket() as bucket:
            before = dict(os.environ)
            os.environ.update(bucket.environment)
            try:
                yield bucket
            finally:
                os.environ.clear()
                os.environ.update(before)

    @contextmanager
    def once(self, name: str) -> Iterator[bool]:
        """Yields whether this is the first time, also of other processes in the same folder, which wait for its end."""
        marker = self.folder / f".{name}"
        with marker.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            is_first = not file.read()
            yield is_first
            if is_first:
                file.write("done")


_NOT_INHERITED = {
    *("JAX_NUM_CPU_DEVICES", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"),
    *("JAXINFRA_FAIL", "JAXINFRA_FAIL_LOG", "JAXINFRA_METADATA", "JAXINFRA_STORAGE_RETRY_S"),
}


def wait(child: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> Ended:
    """Waits for the end of a command; raises NotSurvived if it still runs after a time."""
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(child.pid)
        out, err = child.communicate()
        raise NotSurvived(f"still running after {timeout_s:.0f} s: {err[-2000:]}") from None
    return Ended(child.returncode, out, err, 0.0)


def until(condition: Callable[[], object], child: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> None:
    """Waits for a condition while a command runs."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if child.poll() is not None:
            raise NotSurvived(f"ended with {child.returncode} too early: {child.communicate()}")
        require(time.monotonic() < deadline_s, f"nothing happened within {timeout_s:.0f} s")
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """Returns the children of a process, and theirs, in the order of their starts."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text().split()]
        except FileNotFoundError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def kill_tree(pid: int) -> None:
    """Kills a process and all that it has started."""
    for each in [*descendants(pid), pid]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def named(line: str, *words: str) -> str:
    """Returns the line; raises NotSurvived unless it has all words."""
    missing = [word for word in words if not re.search(re.escape(word), line)]
    require(not missing, f"{' and '.join(missing)} missing in: {line}")
    return line


def _write_text(folder: Path) -> None:
    """Writes files of words in which the next word often follows from the last: there is something to learn."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        text, word = [], 0
        for _ in range(120):
            word = (word * 7 + draw.choice((1, 1, 1, 2))) % 61
            text.append(f"w{word}")
        (folder / f"{number}.txt").write_text(" ".join(text) + "\n")
