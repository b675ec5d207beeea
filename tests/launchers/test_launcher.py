"""Small scripts in place of a training: what is shown, who is told to stop, which exit code comes out."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxinfra.errors import StorageError
from jaxinfra.launchers import launcher
from jaxinfra.launchers.launcher import ProcessExit, exit_code, launch
from jaxinfra.machine import COMPILE_ANEW
from tests.refusals import raises
from tests.tiny_run import is_running
from tests.track import demo

HEAD = """\
import os, signal, subprocess, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
"""
TOLD = """\
def told(number, frame):
    with (folder / f"told-{rank}").open("a") as file:
        file.write("x")
signal.signal(signal.SIGTERM, told)
(folder / f"up-{rank}").write_text(str(os.getpid()))
"""
"""The start of a process that counts its SIGTERMs in the file told-RANK."""
WAIT_TO_BE_TOLD = "while not (folder / f'told-{rank}').exists(): time.sleep(0.01)\n"
PATIENT_S = 600
DRIVER = """\
import sys
from pathlib import Path
from jaxinfra.launchers.launcher import launch
folder, ranks = sys.argv[1], int(sys.argv[2])
environments = [{"RANK": str(rank), "FOLDER": folder} for rank in range(ranks)]
try:
    sys.exit(launch([sys.executable, f"{folder}/stub.py"], environments, Path(folder, "logs")))
except KeyboardInterrupt:
    sys.exit(130)
"""


def run(folder: Path, code: str, ranks: int = 3) -> int:
    """Launches a script in this process."""
    (folder / "stub.py").write_text(HEAD + code)
    environments = [{"RANK": str(rank), "FOLDER": str(folder)} for rank in range(ranks)]
    return launch([sys.executable, str(folder / "stub.py")], environments, folder / "logs")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Launches a script in another process, which gets signals."""
    started = []

    def start(code: str, ranks: int = 3) -> subprocess.Popen[str]:
        (tmp_path / "stub.py").write_text(HEAD + code)
        command = [sys.executable, "-c", DRIVER, str(tmp_path), str(ranks)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=demo.ROOT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def are_up(folder: Path, ranks: int = 3) -> None:
    """Waits until all processes have begun to count their SIGTERMs."""
    for path in (folder / f"up-{rank}" for rank in range(ranks)):
        until(lambda path=path: path.exists() and path.read_text())


def test_lines_name_their_rank_and_equal_errors_appear_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "print('out', rank); print('error: same', file=sys.stderr); print('mine', rank, file=sys.stderr)\n"
    assert run(tmp_path, code + "print('no newline', end='')") == 0
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == sorted(
        ["out 0", "no newline", *(f"[{rank}] {text}" for rank in (1, 2) for text in (f"out {rank}", "no newline"))]
    )
    errors = shown.err.splitlines()
    assert [line for line in errors if "error: " in line] == ["error: same"]
    assert {"mine 0", "[1] mine 1", "[2] mine 2"} < {*errors}
    for rank in range(3):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert {f"out {rank}", "no newline", "error: same", f"mine {rank}"} < {*lines}
        assert lines[-1].endswith("exit code 0")


def test_an_error_is_shown_as_rank_0_has_written_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "time.sleep(0 if rank else 0.5); name = '' if rank == 1 else 'process 1 (host): '\n"
    code += "print(f'error: {name}no such file', file=sys.stderr)\n"
    code += "if rank == 2: print('error: own', file=sys.stderr)"
    assert run(tmp_path, code) == 0
    assert capfd.readouterr().err.splitlines() == ["error: process 1 (host): no such file", "[2] error: own"]


def test_a_traceback_of_several_ranks_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "time.sleep(rank / 2)\nexec(f'raise ValueError(rank // 2)')") == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and "ValueError: 0" in lines
    assert lines[lines.index("ValueError: 0") + 1 :] == ["[2] ValueError: 1"]


def test_logs_have_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the command, which they begin with, nor in a line that is not UTF-8."""
    monkeypatch.setenv("WANDB_API_KEY", "sEcReT-key")
    code = "sys.stdout.buffer.write(b'\\xff http://me:sEcReT@host sEcReT-key')"
    command = [sys.executable, "-c", HEAD + code, "track.mlflow.uri=http://me:sEcReT@host"]
    assert launch(command, [{"RANK": "0", "FOLDER": str(tmp_path)}], tmp_path / "logs") == 0
    log = (tmp_path / "logs/rank-0.log").read_bytes()
    assert b"\xff http://***@host $WANDB_API_KEY\n" in log and b"track.mlflow.uri=http://***@host" in log
    assert b"http://me" not in log and b"sEcReT-key" not in log


def test_logs_go_on_after_a_restart(tmp_path: Path) -> None:
    for number in range(2):
        assert run(tmp_path, f"print('start', {number})", ranks=1) == 0
    assert [line for line in (tmp_path / "logs/rank-0.log").read_text().splitlines() if "start" in line] == [
        "start 0",
        "start 1",
    ]


def test_redrawn_lines_are_logged_as_they_were_last(tmp_path: Path) -> None:
    code = r"sys.stdout.write('\r\x1b[2K 10 %' * 3 + '\r\x1b[2K\x1b[32mdone\x1b[0m\nwindows\r\n' + 'y' * 200_000)"
    assert run(tmp_path, code, ranks=2) == 0
    for rank in range(2):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert lines[1:3] == ["done", "windows"]
        assert "".join(lines[3:-1]) == "y" * 200_000


TERM, KILL = -signal.SIGTERM, -signal.SIGKILL
FORCED = frozenset({signal.SIGTERM, signal.SIGKILL})


@pytest.mark.parametrize(
    ("ends", "stop_requested", "code"),
    [
        ([(0,), (0,)], False, 0),
        ([(75,), (75,)], True, 75),
        ([(0,), (75,)], True, 75),
        ([(76,), (80,), (81,)], False, 80),  # the first that failed by itself
        ([(76,), (76,)], False, 76),
        ([(75,), (76,)], True, 76),
        ([(80,), (75,), (TERM, FORCED)], True, 80),
        ([(KILL,), (76,), (1,)], False, 76),  # killed from outside
        ([(-signal.SIGSEGV, FORCED), (76,)], False, 76),
        ([(76,), (TERM, FORCED), (KILL, FORCED)], False, 76),
        ([(TERM, FORCED), (75,)], True, 75),  # had not begun to train
        ([(TERM, frozenset()), (76,), (3,)], False, 76),
        ([(1,), (76,)], False, 1),
        ([], True, 75),
    ],
)
def test_exit_code_is_that_of_the_cause(ends: list[tuple], stop_requested: bool, code: int) -> None:
    ended = [ProcessExit(rank=rank, code=end[0], sent=frozenset(*end[1:])) for rank, end in enumerate(ends)]
    assert exit_code(ended, stop_requested=stop_requested) == code


def test_the_others_leave_by_themselves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = TOLD + "if rank == 1: sys.exit(80)\ntime.sleep(0.5); sys.exit(76)"
    assert run(tmp_path, code) == 80
    assert not list(tmp_path.glob("told-*"))
    assert capfd.readouterr().err == ""


def test_those_that_hang_are_told_then_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LEAVE_S", 0.2)
    monkeypatch.setattr(launcher, "TERMINATE_S", 0.5)
    code = TOLD + "while rank == 1 and not (folder / 'up-0').exists(): time.sleep(0.01)\n"
    code += "if rank == 1: sys.exit(81)\nwhile True: time.sleep(1)"
    assert run(tmp_path, code, ranks=2) == 81
    assert (tmp_path / "told-0").read_text() == "x"
    assert "SIGKILL" in (tmp_path / "logs/rank-0.log").read_text()


def test_a_process_killed_from_outside_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "if rank == 2: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.5)\n"
    code += "print('error: process 2 (host): was killed', file=sys.stderr); sys.exit(76)"
    assert run(tmp_path, code) == 76
    (line,) = capfd.readouterr().err.splitlines()  # not also what the others say of it
    assert line.startswith("error: process 2 ") and "SIGKILL" in line and "same command" in line


def test_what_a_process_leaves_behind_is_killed(tmp_path: Path) -> None:
    code = "child = subprocess.Popen(['sleep', '1000']); (folder / f'child-{rank}').write_text(str(child.pid))\n"
    code += "child.returncode = 0"  # no warning that it still runs
    assert run(tmp_path, code, ranks=2) == 0
    pids = [int((tmp_path / f"child-{rank}").read_text()) for rank in range(2)]
    until(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_reaches_each_process_once(tmp_path: Path, start: Callable, number: signal.Signals) -> None:
    launcher = start(TOLD + WAIT_TO_BE_TOLD + "time.sleep(0.5); print('saved', file=sys.stderr); sys.exit(75)")
    are_up(tmp_path)
    launcher.send_signal(number)
    until(lambda: len(list(tmp_path.glob("told-*"))) == 3)
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=PATIENT_S)
    assert launcher.returncode == 75
    assert sum("saved" in line for line in err.splitlines()) == 1
    assert [(tmp_path / f"told-{rank}").read_text() for rank in range(3)] == ["x", "x", "x"]


def test_a_second_interrupt_kills(tmp_path: Path, start: Callable) -> None:
    launcher = start(TOLD + "while True: time.sleep(1)")
    are_up(tmp_path)
    launcher.send_signal(signal.SIGINT)
    until(lambda: len(list(tmp_path.glob("told-*"))) == 3)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=PATIENT_S)
    assert launcher.returncode == 130
    assert not any(is_running(int((tmp_path / f"up-{rank}").read_text())) for rank in range(3))


def test_no_process_outlives_a_killed_launcher(tmp_path: Path, start: Callable) -> None:
    launcher = start(TOLD + "while True: time.sleep(1)")
    are_up(tmp_path)
    pids = [int((tmp_path / f"up-{rank}").read_text()) for rank in range(3)]
    assert all(map(is_running, pids))
    launcher.kill()
    until(lambda: not any(map(is_running, pids)))


def test_a_closed_pipe_does_not_end_the_run(tmp_path: Path, start: Callable) -> None:
    code = "while not (folder / 'closed').exists(): time.sleep(0.01)\nfor n in range(5000): print('line', n)"
    launcher = start(code, ranks=2)
    launcher.stdout.close()
    (tmp_path / "closed").touch()
    assert launcher.wait(PATIENT_S) == 0
    launcher.stdout = None  # for communicate()
    for rank in range(2):
        assert "line 4999\n" in (tmp_path / "logs" / f"rank-{rank}.log").read_text()


def test_a_full_disk_loses_lines_of_the_log_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-0.log").symlink_to("/dev/full")
    assert run(tmp_path, "print('shown')", ranks=1) == 0
    shown = capfd.readouterr()
    assert shown.out == "shown\n" and "rank-0.log" in shown.err and shown.err.startswith("warning: ")


def test_logs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with raises(StorageError, str(tmp_path / "logs")):
        run(tmp_path, "")
    assert not list(tmp_path.glob("up-*"))


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux: apt-get install tmux")
def test_progress_bar_and_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """Rank 0 draws its bar as without the launcher; lines of others stay above it, and Ctrl-C is told once."""
    bar = TOLD + (
        "if rank == 0:\n"
        "    (folder / 'demo.py').write_text(os.environ['DEMO'])\n"
        "    words = [str(folder / 'demo.py'), 'auto', str(folder / 'run'), '500', '.1']\n"
        "    bar = subprocess.Popen([sys.executable, *words])\n"
        f"    {WAIT_TO_BE_TOLD}"
        "    bar.kill(); bar.wait()\n"
        "else:\n"
        f"    {WAIT_TO_BE_TOLD.replace('time.sleep(0.01)', 'print(chr(97) * 30); time.sleep(0.5)')}"
        "sys.exit(75)\n"
    )
    (tmp_path / "stub.py").write_text(HEAD + bar)
    (tmp_path / "driver.py").write_text(DRIVER)
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null"]
    command = f"{sys.executable} {tmp_path}/driver.py {tmp_path} 2; echo THE END $?; sleep 600"
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "TMUX")}
    environment = {**clean, "DEMO": demo.RUN, "PYTHONPATH": str(demo.ROOT)}
    subprocess.run([*tmux, "new-session", "-d", "-x", "90", "-y", "50", command], check=True, env=environment)

    def screen() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout

    try:
        until(lambda: "━" in screen() and screen().count("[1] " + "a" * 30 + "\n") >= 3 and "/500" in screen())
        assert sum("━" in line for line in screen().splitlines()) == 1, screen()
        subprocess.run([*tmux, "send-keys", "C-c"], check=True)
        until(lambda: "THE END 75" in screen())
        assert "━" not in screen(), screen()
        assert (tmp_path / "told-0").read_text() == (tmp_path / "told-1").read_text() == "x"
        log = (tmp_path / "logs/rank-0.log").read_text()
        assert "12.3 M" in log and sum("━" in line for line in log.splitlines()) <= 1, "its last state at most"
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)


@pytest.mark.parametrize(("number", "names_variable"), [(signal.SIGKILL, False), (signal.SIGILL, True)])
def test_a_crash_may_be_of_a_compiled_program(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals, names_variable: bool
) -> None:
    assert run(tmp_path, f"os.kill(os.getpid(), {int(number)})", ranks=1) == 76
    line = capfd.readouterr().err
    assert number.name in line and (f"{COMPILE_ANEW}=1" in line) == names_variable
