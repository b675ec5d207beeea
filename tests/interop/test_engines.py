"""Engines load what is exported, and continue texts as `sample` does."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.tiny_run import launch

PROMPT, COUNT = "w1 w7 w50", 20


@needs_torch
@pytest.mark.slow(45)
def test_engines_continue_a_text_as_sample_does(tiny_data: Path, tmp_path: Path) -> None:
    """A run of one step has weights that are nearly random, so that no token repeats itself for long."""
    words = (f"root={tmp_path}", "name=random", "train.steps=1", "track.console=off", "seed=3")
    assert launch(str(tiny_data / "tiny.py"), *words).code == 0
    assert (
        launch("hub", "export", str(tmp_path / "random"), str(tmp_path / "out"), "--max-shard-size", "50KB").code == 0
    )
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 1
    greedy = ("--temperature", "0", "--max-tokens", str(COUNT))
    sampled = launch("sample", str(tmp_path / "random"), PROMPT, *greedy)
    assert launch("sample", f"hf:{tmp_path / 'out'}", PROMPT, *greedy).out == sampled.out
    script = Path(__file__).with_name("torch_engines.py")
    command = [TORCH_PYTHON, script, tmp_path / "out", PROMPT, str(COUNT)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-3000:]
    found = json.loads(made.stdout.splitlines()[-1])
    assert found.pop("problems") == []  # no missing, unexpected or mismatched key
    assert len(found) == 3 and len({*sampled.out.split()}) > 3
    for engine, text in found.items():
        assert f"{PROMPT}{text}" == sampled.out.removesuffix("\n"), engine
