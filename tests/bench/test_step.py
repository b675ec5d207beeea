import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.bench import llama, parallel, slices
from jaxinfra.bench.startup import first_step_s
from jaxinfra.bench.step import CASES, COLUMNS
from jaxinfra.bench.subprocesses import BenchmarkProcessError, call_in_process, run_command
from jaxinfra.bench.table import format_table
from jaxinfra.cli.arguments import BENCHES
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
RECIPE = """\
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import TrainBpe


def config() -> Corpus:
    source = TextFiles(root={text!r})
    return Corpus(store="none", source=source, tokenizer=TrainBpe(vocab_size=300), validation=ByKey(fraction=0.3))
"""
TITLES = [
    "step, float32, one device",
    "step, float32, fsdp=8, emulated",
    "step, bfloat16, one device",
    "baseline step, bfloat16, one device: naive matmuls against fast layouts",
    "step, bfloat16, fsdp=8, emulated",
    "baseline step, bfloat16, fsdp=8, emulated: naive matmuls against fast layouts",
    "dispatch of a step, devices idle",
    "iteration of the training loop, without waiting for devices",
    "process start to end of first step, warm compilation cache",
]


PARTS = {
    "step": CASES,
    "parallel": parallel.CASES,
    "slices": slices.CASES,
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


def test_failed_process_is_an_error_with_its_reason() -> None:
    command = [sys.executable, "-c", "raise SystemExit('it broke')"]
    with pytest.raises(BenchmarkProcessError, match="it broke"):
        run_command(command, os.environ)


def test_function_is_called_in_a_process_with_its_environment() -> None:
    assert call_in_process(os.getenv, {"JAXINFRA_TEST": "set"}, "JAXINFRA_TEST") == "set"
    with pytest.raises(ValueError, match="'x'"):
        call_in_process(int, {}, "x")
    with pytest.raises(BenchmarkProcessError, match="_exit died"):
        call_in_process(os._exit, {}, 1)


def test_process_is_killed_after_its_first_step(tmp_path: Path) -> None:
    script = "import time\nprint('step 1', flush=True)\ntime.sleep(60)"
    assert first_step_s([sys.executable, "-c", script], dict(os.environ), tmp_path / "log") < 30
    with pytest.raises(BenchmarkProcessError):
        first_step_s([sys.executable, "-c", ""], dict(os.environ), tmp_path / "log")


@pytest.mark.slow(90)
def test_all_cases(repo_root: Path, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out.json"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"{i}.txt").write_text("".join(f"value_{i}_{j} = {i * j}\n" for j in range(200)))
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(text=str(corpus)))
    command = [sys.executable, "-m", "launch", "bench", "step", *TINY, f"data.recipe={recipe}"]
    command += ["--pairs", "1", "--json", str(out)]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found = json.loads(out.read_text())
    assert [row["case"] for row in found["rows"]] == TITLES
    assert all(f"| {title} " in process.stdout for title in TITLES)
