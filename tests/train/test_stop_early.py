"""A signal before the first step, while a process compiles or opens its data, ends all processes of the run at once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from jaxinfra.errors import Preempted
from tests.conftest import ROOT
from tests.refusals import preempted
from tests.several import all_ended, free_address
from tests.tiny_run import Tiny, ended

# A compiler that takes longer than any test. As in C++, no handler of a signal cuts it short.
SCRIPT = """
import sys, time
from jaxinfra.cli.main import main
from jaxinfra.program import Program
from jaxinfra.train.trainer import Trainer

def wait(*arguments, **options):
    print("waiting", flush=True)
    time.sleep(1000)

where = sys.argv.pop(1)
if where == "compiling":
    Program.train_step = wait.lower = wait
elif where == "opening":
    Trainer.__init__ = wait
sys.exit(main())
"""


@pytest.fixture
def start(tiny: Tiny) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process of the tiny run that waits somewhere before its first step, or nowhere."""
    children = []

    def start(where: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, where, str(tiny.config), "checkpoint.save_every=1", *arguments]
        pipe, env = subprocess.PIPE, {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
        children.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=env))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


def until_it_waits(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert "waiting\n" in iter(child.stdout.readline, ""), child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process(tiny: Tiny, start: Callable[..., subprocess.Popen[str]], number: signal.Signals) -> None:
    child = start("compiling")
    until_it_waits(child)
    child.send_signal(number)
    preempted(ended(child), number.name, "nothing to save")
    assert [json.loads(path.read_text())["released"] for path in (tiny.directory() / "lease").iterdir()] == [True]
    assert not [*(tiny.directory() / "checkpoints").glob("[0-9]*")]
    assert ended(start("nowhere")).code == 0


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    ("places", "told"),
    [(("compiling", "compiling"), 1), (("nowhere", "compiling"), 0), (("opening", "opening"), 1)],
)
def test_several_processes(
    tiny: Tiny, start: Callable[..., subprocess.Popen[str]], places: tuple[str, str], told: int
) -> None:
    """Also where one process has begun its first step, which it cannot complete alone."""
    options = ("mesh.fsdp=2", "--coordinator", free_address(), "--of", "2", "--process-id")
    children = [start(place, *options, str(index)) for index, place in enumerate(places)]
    for child, place in zip(children, places, strict=True):
        if place != "nowhere":
            until_it_waits(child)
    children[told].send_signal(signal.SIGTERM)
    for each in all_ended(children):
        assert each.code == Preempted.exit_code, each
        preempted(each, f"SIGTERM to process {told}", "" if places[0] == "opening" else "nothing to save")
