"""A process ends with its exit code in a limited time, whatever thread or package would hold it up."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.refusals import names
from tests.tiny_run import ended

SCRIPT = """
import atexit, multiprocessing.pool, os, queue, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from jaxinfra.cli import main
from jaxinfra.cli.entry import main as entry
from jaxinfra.processes import peers

peers.END_S, peers.CLEAN_UP_S = 0.3, 0.9

def forever():
    print("hangs", flush=True)
    time.sleep(1000)

def run(argv=None):
    {code}
    print("an end without a newline", end="")
    return 75

main.main = run
sys.exit(entry())
"""


@pytest.mark.parametrize(
    ("code", "where"),
    [
        ("threading.Thread(target=forever, name='plain').start()", "plain in forever"),
        ("ThreadPoolExecutor(1, 'pool').submit(forever)", "pool_0 in forever"),
        (
            "threading.Thread(target=ThreadPoolExecutor(1, 'inner').submit, args=[forever], daemon=True).start()",
            "inner_0 in forever",
        ),
        ("atexit.register(forever)", "MainThread in forever"),
        (
            "p = multiprocessing.pool.ThreadPool(1); p.apply_async(forever); p.close(); atexit.register(p.join)",
            "_handle_workers",
        ),
        ("threading.Thread(target=forever, daemon=True).start()", None),
    ],
)
def test_a_hang_is_named_and_not_waited_for(code: str, where: str | None) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("{code}", code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    end = ended(process)
    assert end.code == 75 and "an end without a newline" in end.out, end
    if where is None:
        assert not end.err, end
    else:
        names(end.err.removesuffix("\n"), "exit code 75 without waiting", where, "(")
