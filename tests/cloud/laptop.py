"""A machine of a user: a home of its own, a git checkout with a config, and the command line."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_LIMIT_S = 600.0  # of a wait, on a busy machine
_CONFIG = '''\
"""A run of a user, small enough for a test."""

from jaxinfra import (
    MLP, AdamW, Attention, CheckpointConfig, Cosine, Layer, OptimConfig, Precision, Run, TokenData, TrackConfig,
    TrainConfig, TransformerConfig,
)


def config() -> Run:
    return Run(
        name="life",
        root="{bucket}/runs",
        model=TransformerConfig(
            vocab_size=320, num_layers=1, hidden_size=32, layers=(Layer(mixer=Attention(num_heads=4), mlp=MLP(dim=64)),)
        ),
        data=TokenData(store="{bucket}/stores/text", recipe="text.py", seq_len=32),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps=2), peak_lr=3e-3),
        train=TrainConfig(steps={steps}, global_batch=8),
        checkpoint=CheckpointConfig(save_every=5),
        track=TrackConfig(log_every=1, console="plain", tensorboard=False),
    )
'''
_RECIPE = '''\
"""Text for the run, as bytes."""

from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.any_source import TextFiles
from jaxinfra.prepare.tokenizers import Bytes


def config() -> Corpus:
    return Corpus(store="{bucket}/stores/text", source=TextFiles(root="text", pattern="*.txt"), tokenizer=Bytes())
'''


class Laptop:
    """Runs commands as a user does, in the checkout."""

    def __init__(self, home: Path, environment: Mapping[str, str], *, project: Path) -> None:
        self.home, self.project = home, project
        self.home.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "PYTEST"))}
        self.environment = {**kept, "PYTHONPATH": str(Path(__file__).parents[2]), **environment, "HOME": str(self.home)}

    def checkout(self, bucket: str, steps: int) -> None:
        """Makes the checkout, with one commit."""
        (self.project / "text").mkdir(parents=True)
        (self.project / "life.py").write_text(_CONFIG.format(bucket=bucket, steps=steps))
        (self.project / "text.py").write_text(_RECIPE.format(bucket=bucket))
        words = [f"{number} {number * number % 97}" for number in range(4000)]
        for number in range(100):
            text = textwrap.fill(" ".join(words[number * 40 : (number + 1) * 40]), 80)
            (self.project / "text" / f"{number}.txt").write_text(text)
        self.commit()

    def commit(self) -> None:
        """Makes a git repository of the project, with one commit."""
        author = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
        for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "Train"]):
            subprocess.run(["git", *words], cwd=self.project, check=True)

    def start(self, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """Starts a command whose output goes into a file."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(*words),
                cwd=self.project,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        command = self.command(*words)
        return subprocess.run(
            command, cwd=self.project, env=self.environment, capture_output=True, text=True, check=False
        )

    def command(self, *words: str) -> Sequence[str]:
        """Returns the command line."""
        return [sys.executable, "-m", "jaxinfra.cli", *words]


def power_off(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and all that it has started, as a laptop does whose battery is empty."""
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(met: Callable[[], bool], what: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for something; fails with the end of the log if the process ends before, or if it takes too long."""
    deadline_s = time.monotonic() + _LIMIT_S
    while not met():
        if (ended := process.poll() is not None) or time.monotonic() > deadline_s:
            power_off(process)
            end = log.read_text(errors="replace")[-4000:] if log.exists() else ""
            raise AssertionError(f"{what}: {'the command has ended' if ended else 'too late'}\n{end}")
        time.sleep(0.2)
