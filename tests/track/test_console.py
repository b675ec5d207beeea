import io
import math
import os
import pty
import re
import subprocess
import sys
import threading
import time

from rich.console import Console

from jaxinfra.track.console import ConsoleTracker, PlainTextTracker, ProgressBarTracker, announcement
from tests.track import demo


def on_terminal(columns: int, *arguments: object, terminal: str = "xterm-256color") -> str:
    """Runs the demo on a pseudo-terminal and returns every byte that it wrote there."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": terminal, "COLUMNS": str(columns), "LINES": "40"}
    command = [sys.executable, "-c", demo.RUN, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=demo.ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait() == 0, output.decode()
    return output.decode()


def test_the_first_line_has_all_overrides_and_the_first_weights():
    """Also those inside tuples and of classes; `init` with the step that was taken."""
    layers = [{"mixer": {"kind": "attention", "window": 512}}, {"mixer": {"kind": "mamba"}}]
    config = {"name": "y", "init": "runs/x", "seed": 0, "model": {"layers": layers, "dims": [1, 2]}}
    set_there = ["model.layers.0.mixer.window", "model.layers.1.mixer", "model.dims", "init", "name"]
    record = {"config": config, "origins": dict.fromkeys(set_there, "command line") | {"seed": "file:x.py"}}
    words = "model.layers.0.mixer.window=512 model.layers.1.mixer=mamba model.dims=(1, 2)"
    assert announcement("runs/y", record, 0, 9) == f"new run runs/y: {words}"
    record["init"] = {"run": "runs/x", "step": 200, "fingerprint": "0"}
    assert announcement("runs/y", record, 0, 9) == f"new run runs/y: {words} init=runs/x@200"
    assert announcement("runs/y", record, 3, 9).endswith(
        "resuming runs/y at step 3 of 9, which began with init=runs/x@200"
    )
    classes = {"config": {"optim": {"optimizer": {"kind": "adam_w", "b1": 0.9}}}, "command": ["optim.optimizer=adamw"]}
    assert announcement("runs/o", classes, 0, 9) == "new run runs/o: optim.optimizer=adam_w"
    published = {"config": {"name": "z"}, "init": {"run": "hf:org/model", "step": 0, "fingerprint": "0"}}
    assert announcement("runs/z", published, 0, 9) == "new run runs/z: init=hf:org/model"
    assert (
        announcement("runs/z", {"resumed_from": "from copies"}, 3, 9) == "resuming runs/z at step 3 of 9, from copies"
    )
    assert announcement("runs/z", {"resumed_from": "as"}, 0, 9) == "resuming runs/z at step 0 of 9, as"


def test_plain_lines_on_a_pipe(tmp_path):
    result = demo.start(demo.RUN, "auto", tmp_path, 40, 0)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert [line.split()[:2] for line in lines if "validation" not in line and "saving" not in line] == [
        ["step", "1/40"] if done == 1 else ["step", f"{done}/40"] for done in (1, 10, 20, 30, 40)
    ]
    expected = "step 10/40  loss  3.4100  lr 2.9e-04  grad norm  0.81  tokens/s    41,234  mfu 31.2%  eta    0:00"
    assert lines[1] == expected
    assert len({len(line) for line in lines if "lr" in line}) == 1, "columns must not move"
    assert "step 20/40  validation  loss 3.2500  bits per byte 1.5000" in lines
    assert f"step 20/40  saving {tmp_path}/checkpoints/20" in lines
    assert f"new run {tmp_path}: a.b=1" in result.stdout
    assert "\x1b" not in result.stdout
    assert re.search(r"parameters +12\.3 M +count", result.stdout)
    assert re.search(r"Validation bits per byte +1\.5000\s+unigram, bits per byte +4\.5000", result.stdout)


def test_bar_on_a_terminal(tmp_path):
    output = on_terminal(100, "auto", tmp_path, 40, 0.02)
    assert "\x1b[?25l" in output and output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert re.search(r"\d+/40  loss 3\.\d{4}  eta \d+:\d\d  41,234 tokens/s  mfu 31\.2%", output)
    assert "40/40" in output and "step 20/40  validation  loss 3.2500" in output  # stays above the bar
    assert "━" in output and "lr 2.9e-04" not in output
    assert "printed by the run" in output and "Summary" in output
    frames = output.count("41,234 tokens/s")
    assert frames <= 4 * 2.5 + 3, "at most four frames a second, one for each print, one at the end"


def test_bar_fits_a_narrow_terminal(tmp_path):
    output = on_terminal(44, "auto", tmp_path, 40, 0.01)
    assert re.search(r"/40  loss 3\.\d{4}", output) and "tokens/s" not in output


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(tmp_path):
    output = on_terminal(120, "auto", tmp_path, 20, 0, terminal="dumb")
    assert "step 20/20" in output and "\x1b[?25l" not in output


def test_off_prints_nothing(tmp_path):
    result = demo.start(demo.RUN, "off", tmp_path, 20, 0)
    assert (result.stdout, result.stderr) == ("printed by the run\n", "")


def test_log_draws_nothing(monkeypatch, tmp_path):
    """A log call takes note; drawing is left to the thread of the bar, and to the lines that are due."""
    metrics = {"loss": 3.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 4e4, "mfu": 0.3}
    terminal = Console(file=io.StringIO(), force_terminal=True)
    drew: list[int] = []
    monkeypatch.setattr(ProgressBarTracker, "_draw", lambda self: drew.append(threading.get_ident()) or "")
    for tracker in (ProgressBarTracker(terminal, tmp_path), PlainTextTracker(terminal, tmp_path, 10_000)):
        tracker.start({}, {}, start_step=0, total_steps=10_000)
        drew.clear()
        tracker.log(1, metrics)  # Plain prints the first step, and then no other for a while
        written = len(terminal.file.getvalue()) if isinstance(tracker, PlainTextTracker) else None
        for step in range(2, 2000):
            tracker.log(step, metrics)
        assert threading.get_ident() not in drew
        assert written is None or len(terminal.file.getvalue()) == written
        tracker.close()


def test_plain_prints_once_every_log_every_steps_however_often_it_is_told(tmp_path):
    for every, logged in ((10, range(1, 41)), (10, range(9, 40, 10)), (4, range(0, 41, 4))):
        console = Console(file=(out := io.StringIO()))
        plain = PlainTextTracker(console, tmp_path, every)
        plain.start({}, {}, start_step=0, total_steps=41)
        for step in logged:
            plain.log(step + 1, {"loss": 1.0})
        assert abs(len(re.findall(r"^step +\d+/41", out.getvalue(), re.MULTILINE)) - 41 / every) <= 2


def test_eta_counts_from_the_first_log_after_a_resume():
    tracker = ConsoleTracker(Console(file=(out := io.StringIO())), "runs/x")
    tracker.start({}, {}, start_step=100, total_steps=200)
    assert math.isnan(tracker.eta_s())
    tracker.finish_step(101)  # it is compiled
    assert math.isnan(tracker.eta_s())
    time.sleep(0.02)
    tracker.finish_step(102)
    assert 0.02 * 98 <= tracker.eta_s() < 20 * 98
    tracker.log_save(102)
    assert "step 102/200" in out.getvalue()
