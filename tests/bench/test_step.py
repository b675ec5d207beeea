import json
import os
import sys
from pathlib import Path

import pytest

from launch.arguments import BENCHES
from tests.bench import llama, parallel, slices, verdicts
from tests.bench.commands import WorkerError, call_in_process, run_command
from tests.bench.step import CASES, COLUMNS, first_step_s
from tests.bench.table import format_table, ratio_row
from tests.refusals import names, refused
from tests.tiny_run import launch

TINY = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.layers.mixer.num_heads=2",
    "model.layers.mlp.dim=64",
    "model.vocab_size=512",
    "data.seq_len=16",
    "train.global_batch=8",
]
TITLES = ("dispatch of a step, devices idle", "iteration of the training loop, without waiting for devices")


PARTS = {
    "step": CASES,
    "parallel": parallel.CASES,
    "slices": slices.CASES,
    "verdicts": verdicts.WAYS,
    "llama": llama.CASES,
    "data": ("speed", "first", "memory"),
}


@pytest.mark.parametrize("bench", PARTS)
def test_command_line_lists_every_part(bench: str) -> None:
    assert BENCHES[bench].parts == tuple(PARTS[bench])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("step --pairs 0", "--pairs 0: 1"),
        ("step --against {tmp}/none.py", "--against none.py:"),
        ("parallel --against x.py", "--against x.py:"),
        ("llama --pairs 3", "--pairs 3:"),
        ("step --devices cpu:4", "--devices cpu:4:"),
        ("step --tokens 5", "--tokens 5:"),
        ("data --tokens 5", "--tokens 5:"),
        ("parallel --only float32", "--only float32: axes, experts, schedules"),
        ("step model.foo=3 --only dispatch", "model.foo"),
        ("step model.layers.mixer.rope=none --only dispatch", "rotary"),
        ("step --config configs/vit_digits.py --only float32", "vit images"),
    ],
)
def test_wrong_arguments_are_rejected(
    words: str, named: str, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    ended = launch("bench", *words.format(tmp=tmp_path).split())
    *measured, line = ended.err.splitlines()
    assert ended.code == 81 and len(measured) <= 1, ended
    assert names(line, named).startswith("error: ")


@pytest.mark.parametrize("place", ["none/x.json", ""])
def test_unwritable_json_path_is_named(place: str, tmp_path: Path) -> None:
    refused(launch("bench", "step", "--json", str(tmp_path / place)), str(tmp_path / place), code=82)


def test_table_is_markdown() -> None:
    row = {"case": "a", "jaxinfra": "1.0 ms", "ratio": None}
    lines = format_table(COLUMNS, [row]).splitlines()
    assert lines[0].startswith("| case") and lines[1].startswith("|---") and lines[2].startswith("| a ")
    assert len({line.count("|") for line in lines}) == 1


def test_a_row_has_the_medians_and_the_median_of_the_ratios() -> None:
    first_s, second_s = [0.002, 0.004, 0.009], [0.002, 0.002, 0.003]
    row = ratio_row("a", {"jaxinfra": first_s, "baseline": second_s}, digits=2)
    assert row == {"case": "a", "jaxinfra": "4.00 ms", "baseline": "2.00 ms", "ratio": 2.0}
    assert ratio_row("a", {"several": first_s}, unit="s", digits=3) == {"case": "a", "several": "0.004 s"}


def test_failed_process_is_an_error_with_its_reason() -> None:
    command = [sys.executable, "-c", "raise SystemExit('it broke')"]
    with pytest.raises(WorkerError, match="it broke"):
        run_command(command, os.environ)


def test_function_is_called_in_a_process_with_its_environment() -> None:
    assert call_in_process(os.getenv, {"JAXINFRA_TEST": "set"}, "JAXINFRA_TEST") == "set"
    with pytest.raises(ValueError, match="'x'"):
        call_in_process(int, {}, "x")
    with pytest.raises(WorkerError, match="_exit died"):
        call_in_process(os._exit, {}, 1)


def test_process_is_killed_after_its_first_step(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
import time
alive = Path({str(tmp_path / "alive")!r})
print("steps  100", flush=True)
time.sleep(0.1)
alive.write_text("until the step")
print("step 1/100  loss 2.5", flush=True)
time.sleep(600)
alive.write_text("after it")
"""
    first_step_s([sys.executable, "-c", script], dict(os.environ), tmp_path / "log")
    assert (tmp_path / "alive").read_text() == "until the step"
    with pytest.raises(WorkerError):
        first_step_s([sys.executable, "-c", ""], dict(os.environ), tmp_path / "log")


@pytest.mark.slow(20)
def test_dispatch_is_timed(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest part, once; `test_bench_step_in_processes` times steps."""
    monkeypatch.chdir(repo_root)
    out = tmp_path / "out.json"
    done = launch("bench", "step", *TINY, "--only", "dispatch", "--pairs", "1", "--json", str(out))
    assert done.code == 0, done
    step, loop = json.loads(out.read_text())["rows"]
    assert (step["case"], loop["case"]) == TITLES
    assert step["ratio"] is not None and step["baseline"].endswith(" ms") and "baseline" not in loop
    assert all(f"| {title} " in done.out for title in TITLES)
