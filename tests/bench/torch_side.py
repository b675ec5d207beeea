"""The step of `torch_step.py`, in its own process, as another side of `bench step`."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from jaxinfra.run import Run
from tests.bench.baseline import BaselineConfig
from tests.bench.commands import command_error
from tests.bench.measure import baseline_config
from tests.interop import torch_python
from tests.interop.torch_python import TORCH_PYTHON

type Mode = Literal["eager", "compile"]
SCRIPT = Path(torch_python.__file__).with_name("torch_step.py")


class TorchStep:
    """A process that makes a step each time it is asked; it ends with this one."""

    def __init__(self, config: BaselineConfig, mode: Mode, words: Sequence[str] = ()) -> None:
        """Starts it; `words` are more of its arguments."""
        self._command = [str(TORCH_PYTHON), str(SCRIPT), json.dumps(asdict(config)), mode, *words]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        self.loss = float("nan")

    def time(self, number: int = 0, *, dispatch_only: bool = False) -> float:
        """Makes one step and returns its seconds; raises WorkerError if the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise command_error([*self._command[:2], "..."], "it ended, and says why above")
        seconds, self.loss = map(float, answer.split())
        return seconds

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def torch_step(run: Run, mode: Mode) -> TorchStep:
    """Starts PyTorch with the model, batch and optimizer of the baseline."""
    return TorchStep(baseline_config(run), mode)
