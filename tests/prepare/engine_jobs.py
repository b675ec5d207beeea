"""Job functions that workers can import."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from jaxinfra.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Job:
    number: int
    folder: str = ""


class Odd(Exception):
    """An error that cannot be unpickled, because its arguments differ from those of `__init__`."""

    def __init__(self, left, right):
        super().__init__(f"{left} and {right}")


def square(job: Job) -> tuple[int, int]:
    return job.number, job.number**2


def process_of(job: Job) -> tuple[int, str | None]:
    time.sleep(0.2)
    return os.getpid(), os.environ.get("RAYON_NUM_THREADS")


def fail(job: Job) -> int:
    if job.number == 3:
        raise DataError(f"shard {job.number}: is damaged")
    if job.number > 3:
        time.sleep(600)
    return job.number


def fail_oddly(job: Job) -> int:
    raise Odd("one", "two")


def give_a_lambda(job: Job):
    return lambda: job


def die_once(job: Job) -> int:
    marker = Path(job.folder) / "died"
    if job.number == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if job.number == 2:
        (Path(job.folder) / "again").touch()
    return job.number


def die_once_and_fail_last(job: Job) -> int:
    if job.number == 6:
        while not (Path(job.folder) / "again").exists():
            time.sleep(0.1)
        raise DataError(f"shard {job.number}: is damaged")
    if job.number == 7:
        time.sleep(600)
    return die_once(job)


def die(job: Job) -> int:
    if job.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number


def end(job: Job) -> int:
    os._exit(3)


def sleep(job: Job) -> int:
    (Path(job.folder) / f"{job.number}.{os.getpid()}").touch()
    time.sleep(600)
    return 0


def drive_sleepers(folder: str) -> None:
    """Runs sleeping jobs, in a driver process that tests kill."""
    from jaxinfra.prepare.engines import run_jobs

    run_jobs("local", sleep, [Job(number=number, folder=folder) for number in range(4)], workers=2, on_result=print)


def start_driver(folder: Path, pids: int) -> tuple["subprocess.Popen[str]", list[int]]:
    """Starts a driver and waits until its workers run jobs; returns the driver and the workers' process ids."""
    # What the shell started in the background, and all that it starts, ignores Ctrl-C.
    answer = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{answer}; from tests.prepare.engine_jobs import drive_sleepers; drive_sleepers({str(folder)!r})"
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while len(names := [path.name for path in folder.iterdir()]) < pids:
        time.sleep(0.02)
        assert driver.poll() is None
    return driver, [int(name.partition(".")[2]) for name in names]


def outside_of_loopback() -> list[tuple[str, int]]:
    """Returns the listening addresses that other machines could reach."""
    this = psutil.Process()
    found = []
    for process in [this, *this.children(recursive=True)]:
        try:
            found += [each.laddr for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            continue
    return [
        (address.ip, address.port) for address in found if address.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]
