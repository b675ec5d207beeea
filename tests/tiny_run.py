"""A run so small that a test can afford it: random words, 2 layers, 12 steps."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxinfra.cli.main import main
from jaxinfra.config import load
from jaxinfra.run import Run
from jaxinfra.track.jsonl import read_metrics

STEPS = 12
CONFIG = """\
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.data.tokens import TokenData
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.optim.optimizers import AdamW
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.schedules import Cosine
from jaxinfra.run import Precision, Run
from jaxinfra.track.config import TrackConfig
from jaxinfra.run import TrainConfig


def config() -> Run:
    return Run(
        name="tiny",
        root={runs!r},
        model=TransformerConfig(
            vocab_size=304, num_layers=2, hidden_size=32, layers=(Layer(mixer=Attention(num_heads=8), mlp=MLP(dim=64)),)
        ),
        data=TokenData(
            store={store!r},
            recipe={recipe!r},
            seq_len=32,
        ),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps=2), peak_lr=3e-3),
        train=TrainConfig(steps={steps}, global_batch=8, eval_every=5),
        checkpoint=CheckpointConfig(save_every=5),
        track=TrackConfig(log_every=1, console="plain", tensorboard=False),
    )
"""
RECIPE = """\
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import TrainBpe


def config() -> Corpus:
    return Corpus(
        store={store!r},
        source=TextFiles(root={text!r}, pattern="*.txt"),
        tokenizer=TrainBpe(vocab_size=300),
        validation=ByKey(fraction=0.2),
    )
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A config file, the recipe of its data, and the place where its runs go."""

    config: Path
    recipe: Path
    runs: Path

    def launch(self, *arguments: str, command: str = "train", config: Path | None = None) -> Ended:
        """Runs a command on the config in this process."""
        words = [] if command == "train" else command.split()
        return launch(*words, str(config or self.config), *arguments)

    def start(self, *arguments: str, devices: int = 1, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Trains in a process of its own."""
        return start(str(self.config), *arguments, "--devices", f"cpu:{devices}", env=env)

    def loaded(self, *overrides: str) -> Run:
        return load(self.config, overrides, root=Run).run

    def directory(self, name: str = "tiny") -> Path:
        return self.runs / name

    def losses(self, name: str = "tiny") -> dict[int, str]:
        """Loss of every logged step, to the last bit."""
        rows = read_metrics(self.directory(name) / "metrics.jsonl")
        return {int(row["step"]): row["loss"].hex() for row in rows if "loss" in row}

    def evaluations(self, name: str = "tiny") -> dict[int, float]:
        """Validation loss of every evaluation."""
        rows = read_metrics(self.directory(name) / "metrics.jsonl")
        return {int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row}

    def edited(self, old: str, new: str, name: str = "edited.py") -> Path:
        """A copy of the config file with one text replaced."""
        text = self.config.read_text()
        assert text.count(old) == 1, old
        path = self.config.with_name(name)
        path.write_text(text.replace(old, new))
        return path


def launch(*arguments: str) -> Ended:
    """Runs a command line in this process, on its eight devices."""
    out, err = io.StringIO(), io.StringIO()
    environment = dict(os.environ)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    except SystemExit as left:  # argparse, for wrong usage
        code = left.code if isinstance(left.code, int) else 1
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return Ended(code=code, out=out.getvalue(), err=err.getvalue())


def start(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Starts `python -m launch` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **(env or {})},
    )


def ended(process: subprocess.Popen, timeout_s: float = 600) -> Ended:
    """Waits for a process."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s\n{out}\n{err}") from None
    return Ended(code=process.returncode, out=out, err=err)


def is_running(pid: int) -> bool:
    """Whether a process runs: not gone, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def write_text(folder: Path, files: int = 30, words: int = 120) -> None:
    """Files of words in which the next word often follows from the last: there is something to learn."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(files):
        text, word = [], 0
        for _ in range(words):
            word = (word * 7 + draw.choice((1, 1, 1, 2))) % 61
            text.append(f"w{word}")
        (folder / f"{number}.txt").write_text(" ".join(text) + "\n")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, and every empty folder; not the lease, which each start takes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.parent.name == "lease":
            continue
        found[str(path.relative_to(folder))] = b"" if path.is_dir() else path.read_bytes()
    return found


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text/` and its prepared `store/`; tests only read it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_text(folder / "text")
    made = _write_config(folder, folder, STEPS)
    assert launch("data", "prepare", str(made.recipe), "--workers", "1").code == 0
    return folder


@pytest.fixture
def tiny(tiny_data: Path, tmp_path: Path) -> Tiny:
    """The tiny config, with a place for runs that is the test's own."""
    return _write_config(tmp_path, tiny_data, STEPS)


def _write_config(folder: Path, data: Path, steps: int) -> Tiny:
    runs, config, recipe = folder / "runs", folder / "tiny.py", folder / "recipe.py"
    store, text = str(data / "store"), str(data / "text")
    recipe.write_text(RECIPE.format(store=store, text=text))
    config.write_text(CONFIG.format(runs=str(runs), store=store, recipe=str(recipe), steps=steps))
    return Tiny(config=config, recipe=recipe, runs=runs)
