"""A config that is written as a config file is loaded as the same config."""

from pathlib import Path

import pytest

from jaxinfra.config import diff, load
from jaxinfra.config.source_code import source_code
from jaxinfra.run import Run


@pytest.mark.parametrize("name", ["quickstart", "gemma2_2b", "moe_small", "vit_digits", "llama3_8b_128k"])
def test_it_is_loaded_as_the_same_config(name: str, tmp_path: Path, repo_root: Path) -> None:
    run = load(repo_root / f"configs/{name}.py", root=Run).run
    file = tmp_path / "written.py"
    file.write_text(source_code(run, "A run."))
    assert diff(load(file, root=Run).run, run) == []
    assert max(map(len, file.read_text().splitlines())) <= 120


def test_a_default_is_written_if_asked_for_and_a_comment_follows_its_field(tmp_path: Path, repo_root: Path) -> None:
    run = load(repo_root / "configs/quickstart.py", ["train.steps=1000"], root=Run).run
    file = tmp_path / "written.py"
    assert "steps=1000" not in source_code(run, "A run.")
    file.write_text(source_code(run, "A run.", always=("train.steps",), comments={"optim.peak_lr": "tuned"}))
    assert "steps=1000" in file.read_text()
    assert [line.rpartition("  ")[2] for line in file.read_text().splitlines() if "peak_lr=" in line] == ["# tuned"]
    assert diff(load(file, root=Run).run, run) == []
