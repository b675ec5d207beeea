"""Small scripts in place of a training: what is started again, how often, and what is told and recorded."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import override

import pytest

from jaxinfra.cli.main import EXIT_CODES
from jaxinfra.launchers import launcher
from jaxinfra.launchers.restart_policy import RULES, RestartLimits
from jaxinfra.launchers.supervisor import Attempt, EqualStarts, Start, supervise
from tests.conftest import ROOT
from tests.launchers.test_launcher import until
from tests.tiny_run import is_running

STUB = """\
import os, signal, struct, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
number = len(list(folder.glob(f"start-{rank}-*")))
(folder / f"start-{rank}-{number}").write_text(str(os.getpid()))

def complete(first, last):
    Path(os.environ["JAXINFRA_STEP_FILE"]).write_bytes(struct.pack("<qq", first, last))

def die(number):
    os.kill(os.getpid(), number)
    time.sleep(60)
"""
"""Counts its starts in the files start-RANK-N; `number` is that of earlier ones."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes get little time when one has failed."""
    monkeypatch.setattr(launcher, "LEAVE_S", 1.0)
    monkeypatch.setattr(launcher, "TERMINATE_S", 1.0)


def run(
    folder: Path, code: str, ranks: int = 1, limits: RestartLimits | None = None, first_rank: int = 0
) -> tuple[int, list[Attempt]]:
    """Supervises a script in this process; returns the exit code and the attempts."""
    (folder / "stub.py").write_text(STUB + code)
    attempts: list[Attempt] = []
    starts = EqualStarts(
        command=[sys.executable, str(folder / "stub.py")],
        environments=lambda: [{"RANK": str(rank), "FOLDER": str(folder)} for rank in range(ranks)],
        first_rank=first_rank,
    )
    limits = limits or RestartLimits(scale=0.01)
    return supervise(starts, folder / "logs", "LOGS", limits, attempts.append), attempts


@pytest.mark.parametrize("code", sorted(RULES))
def test_each_code_is_followed_by_its_rule(tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int) -> None:
    ended, attempts = run(tmp_path, f"complete(1, 7)\nsys.exit({code} if not number else 0)")
    err = capfd.readouterr().err
    assert [attempt.exit_code for attempt in attempts] == [code, *([0] if RULES[code].restarts else [])]
    if RULES[code].restarts:
        assert ended == 0 and re.search(rf"^restart 1: .*{code}.* after step 7; starting again in \d+ s\n$", err), err
    else:
        assert ended == code
        assert (err == "") == (code == 0) and "restart" not in err
        assert code == 0 or (f"{code} " in err and "LOGS/rank-0.log" in err and err.count("\n") == 1), err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_process_killed_by_a_signal_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    code = f"if number: sys.exit(0)\nif rank == 0: complete(201, 240)\nif rank: time.sleep(0.3); die({int(number)})\n"
    ended, (first, second) = run(tmp_path, code + "time.sleep(0.6)\nsys.exit(76)", ranks=2)
    (line,) = capfd.readouterr().err.splitlines()
    assert ended == 0 and line.startswith(f"restart 1: process 1 killed by {number.name} after step 240; ")
    assert (first.exit_code, first.signal, first.rank, first.log) == (76, number.name, 1, "LOGS/rank-1.log")
    assert (first.first_step, first.last_step, second.last_step) == (201, 240, None)
    assert first.pids == [int((tmp_path / f"start-{rank}-0").read_text()) for rank in range(2)]
    assert first.started < first.ended <= second.started < second.ended
    assert first.started_monotonic_s < first.ended_monotonic_s <= second.started_monotonic_s


def test_a_crash_without_progress_compiles_anew_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Start 0 is killed from outside; starts 4 and 5 progress; starts 1, 2, 3, 5 and 6 crash."""
    code = """\
if number in (4, 5): complete(1, number)
if os.environ.get("JAXINFRA_COMPILE_ANEW"): print(number)
if number < 7: die([9, 11, 11, 6, 15, 4, 4][number])
"""
    limits = RestartLimits(scale=0.001, max_in_a_row=99)
    ended, attempts = run(tmp_path, code, limits=limits)
    shown = capfd.readouterr()
    assert (ended, len(attempts)) == (0, 8)
    assert shown.out == "2\n7\n"
    assert [line.split()[1] for line in shown.err.splitlines() if "compiled anew" in line] == ["2:", "7:"]


@pytest.mark.parametrize(
    ("number", "steps", "code", "is_only_here"),
    [
        (1, "", 78, False),
        (2, "", 78, True),
        (2, "complete(1, 7)", 78, False),
        (1, "", 84, True),
        (1, "", 83, True),
        (2, "", 0, False),
    ],
)
def test_a_host_that_lacks_something_ends_the_run_only_where_others_did_not_train(
    tmp_path: Path, number: int, steps: str, code: int, is_only_here: bool
) -> None:
    """Of an elastic run: `number` is that of the start over its life."""
    (tmp_path / "stub.py").write_text(f"{STUB}{steps}\nsys.exit({code})")
    told: list[tuple[int, bool]] = []

    class Round(EqualStarts):
        @override
        def next_start(self, is_stopped: Callable[[], bool]) -> Start | int:
            hosts = {"number": number, "hosts": [{"index": 0}]}
            start = super().next_start(is_stopped)
            return start if isinstance(start, int) else replace(start, hosts=hosts)

        @override
        def end(self, code: int, *, only_here: bool) -> None:
            told.append((code, only_here))

    command = [sys.executable, str(tmp_path / "stub.py")]
    starts = Round(command=command, environments=lambda: [{"RANK": "0", "FOLDER": str(tmp_path)}])
    limits = RestartLimits(scale=0.01)
    assert supervise(starts, tmp_path / "logs", "LOGS", limits, lambda attempt: None) == code
    assert told == [(code, is_only_here)]


@pytest.mark.parametrize(("are_lost", "number", "code"), [(True, 6, 0), (False, 6, 76), (True, 11, 76)])
def test_an_abort_as_another_host_is_lost_is_no_crash(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], *, are_lost: bool, number: int, code: int
) -> None:
    """As Gloo does it; six starts of an elastic run end so, with a host less each time."""
    anew = "if os.environ.get('JAXINFRA_COMPILE_ANEW'): print(number)\n"
    (tmp_path / "stub.py").write_text(f"{STUB}{anew}if number < 6: die({number})")
    ends: list[int] = []

    class Rounds(EqualStarts):
        @override
        def next_start(self, is_stopped: Callable[[], bool]) -> Start | int:
            hosts = [{"index": index} for index in range(8 - len(ends) if are_lost else 8)]
            start = super().next_start(is_stopped)
            return start if isinstance(start, int) else replace(start, hosts={"number": 1, "hosts": hosts})

    command = [sys.executable, str(tmp_path / "stub.py")]
    starts = Rounds(command=command, environments=lambda: [{"RANK": "0", "FOLDER": str(tmp_path)}])
    limits = RestartLimits(scale=0.001)
    assert supervise(starts, tmp_path / "logs", "LOGS", limits, lambda attempt: ends.append(attempt.exit_code)) == code
    shown = capfd.readouterr()
    assert ends == ([*[76] * 6, 0] if code == 0 else [76] * 5)
    assert ("crash loop" in shown.err) == (code != 0)
    assert shown.out == ("" if code == 0 else "1\n")
    assert ("compiled anew: one in the compile cache may be the cause, unless a host is missing" in shown.err) == (
        number == 6
    )


def test_a_process_of_another_host_has_its_own_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended, attempts = run(tmp_path, "print('out')\nif not number: die(9)", first_rank=3)
    shown = capfd.readouterr()
    assert (ended, attempts[0].rank, shown.out) == (0, 3, "out\nout\n")
    assert shown.err.startswith("restart 1: process 3 killed") and (tmp_path / "logs/rank-3.log").exists()


def test_a_crash_loop_is_reported_with_what_was_tried(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Steps that earlier starts have completed, too, are no progress."""
    code = "complete(1, 8 - number)\nprint('error: no such host', file=sys.stderr)\nsys.exit(76)"
    ended, attempts = run(tmp_path, code)
    *restarts, last = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("error: ")]
    assert (ended, len(attempts), len(restarts)) == (76, 6, 5)
    assert all(word in last for word in ("crash loop", "5 starts", "after step 3", "no such host", "LOGS/rank-0.log"))
    assert attempts[-1].error == "no such host"


def test_the_limit_of_an_hour_holds_in_spite_of_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended, attempts = run(
        tmp_path, "complete(1, 1 + number)\nsys.exit(76)", limits=RestartLimits(max_per_hour=3, scale=0.01)
    )
    assert (ended, len(attempts)) == (76, 4)
    assert "3 restarts in an hour" in (line := capfd.readouterr().err.splitlines()[-1]) and "--max-restarts" in line


def test_waits_double_until_there_is_progress() -> None:
    def waits_s(code: int, progress: str, limits: RestartLimits) -> list[float]:
        found = []
        for each in progress:
            limits.count(progressed=each == "p")
            found.append(limits.restart(RULES[code], 0.0))
        return found

    for code, first_s, longest_s in ((76, 1, 300), (82, 60, 300)):
        expected_s = [first_s, *(min(first_s * 2**n, longest_s) for n in range(9)), first_s, first_s]
        for wait_s, share_s in zip(waits_s(code, "p" + "-" * 9 + "p-", RestartLimits()), expected_s, strict=True):
            assert share_s / 2 <= wait_s <= share_s * 1.5
    limits = RestartLimits(max_per_hour=2)
    waits_s(76, "pp", limits)
    assert limits.is_used_up(3599.0) and not limits.is_used_up(3600.0)


def test_a_restart_needs_no_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Their storage may be away for a while."""
    code = (
        "import shutil\nif not number: shutil.rmtree(folder / 'logs'); (folder / 'logs').touch(); die(9)\nprint('on')"
    )
    assert run(tmp_path, code)[0] == 0
    shown = capfd.readouterr()
    assert shown.out == "on\n" and [line.partition(" ")[0] for line in shown.err.splitlines()] == [
        "restart",
        "warning:",
    ]


def test_a_run_that_another_start_has_is_left_to_it(tmp_path: Path) -> None:
    ended, attempts = run(tmp_path, "sys.exit(84)")
    assert (ended, attempts) == (84, []), "the directory is the other one's"


DRIVER = """\
import sys
from pathlib import Path
from jaxinfra.launchers.restart_policy import RestartLimits
from jaxinfra.launchers.supervisor import EqualStarts, supervise
folder = Path(sys.argv[1])
command = [sys.executable, str(folder / "stub.py")]
starts = EqualStarts(command=command, environments=lambda: [{"RANK": "0", "FOLDER": str(folder)}])
def record(attempt):
    with (folder / "attempts").open("a") as file:
        file.write(f"{attempt.exit_code} ")
try:
    code = supervise(starts, folder / "logs", "LOGS", RestartLimits(scale=float(sys.argv[2])), record)
except KeyboardInterrupt:
    code = 130
assert "jax" not in sys.modules
sys.exit(code)
"""


def start(folder: Path, code: str, scale: float = 0.01) -> subprocess.Popen[str]:
    """Supervises a script in another process, which gets signals."""
    (folder / "stub.py").write_text(STUB + code)
    command = [sys.executable, "-c", DRIVER, str(folder), str(scale)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)


TOLD = """\
def told(number, frame):
    (folder / signal.Signals(number).name).touch()
    if number == signal.SIGTERM: sys.exit(75)
for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT): signal.signal(each, told)
(folder / f"up-{number}").touch()
while True: time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_nothing_starts_again(tmp_path: Path, number: signal.Signals) -> None:
    supervisor = start(tmp_path, TOLD)
    until((tmp_path / "up-0").exists)
    for passed in (signal.SIGUSR1, signal.SIGQUIT):
        supervisor.send_signal(passed)
        until((tmp_path / passed.name).exists)
    supervisor.send_signal(number)
    supervisor.communicate(timeout=600)
    assert supervisor.returncode == 75 and (tmp_path / "SIGTERM").exists()
    assert (tmp_path / "attempts").read_text() == "75 "


def test_a_process_that_is_told_alone_starts_again(tmp_path: Path) -> None:
    supervisor = start(tmp_path, TOLD)
    until((tmp_path / "up-0").exists)
    os.kill(int((tmp_path / "start-0-0").read_text()), signal.SIGTERM)
    until((tmp_path / "up-1").exists)
    supervisor.send_signal(signal.SIGTERM)
    supervisor.communicate(timeout=600)
    assert supervisor.returncode == 75


def test_a_signal_ends_the_wait_before_a_restart(tmp_path: Path) -> None:
    supervisor = start(tmp_path, "die(9)", scale=1000.0)
    assert supervisor.stderr is not None
    assert supervisor.stderr.readline().startswith("restart 1: ")
    supervisor.send_signal(signal.SIGINT)
    supervisor.communicate(timeout=600)
    assert supervisor.returncode == 75


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, lambda *_: (folder / 'told').touch())\n(folder / 'up').touch()\n"
    supervisor = start(tmp_path, code + "while True: time.sleep(1)")
    for file in ("up", "told"):
        until((tmp_path / file).exists)
        supervisor.send_signal(signal.SIGINT)
    supervisor.communicate(timeout=600)
    assert supervisor.returncode == 130 and not is_running(int((tmp_path / "start-0-0").read_text()))


def test_no_process_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    supervisor = start(tmp_path, TOLD)
    until((tmp_path / "up-0").exists)
    supervisor.kill()
    supervisor.communicate()
    until(lambda: not is_running(int((tmp_path / "start-0-0").read_text())))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_pages_and_help_agree_with_the_table() -> None:
    """The table of exit codes, `--help` and the Slurm script; test_kubernetes.py compares the manifests."""
    restarted = {code for code, rule in RULES.items() if rule.restarts}
    rows = re.findall(r"^\| (\d+) \|.*\| (yes|no) \|", page("exit-codes.md"), re.MULTILINE)
    assert {int(code): answer == "yes" for code, answer in rows} == {code: code in restarted for code in RULES}
    for code, rule in RULES.items():
        assert f"{code} {rule.meaning}" in " ".join(EXIT_CODES.split())
    script = page("run-on.md").partition("case $code in\n")[2].partition("esac")[0]
    labels = " ".join(re.findall(r"^ *([\d| ]+)\)", script, re.MULTILINE)).replace("|", " ").split()
    assert {*map(int, labels)} == restarted | {137}
