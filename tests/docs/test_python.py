"""The blocks of docs/python.md work as one script, on emulated devices."""

import re
from pathlib import Path

import pytest

from jaxinfra.train.trainer import Trainer

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow(20)
def test_the_blocks_of_the_page_work_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "script"}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec", dont_inherit=True), names)
    trainer, summary = names["trainer"], names["summary"]
    assert isinstance(trainer, Trainer)
    assert summary["status"] == "finished"
    assert trainer.state.step == names["again"].state.step == 20
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"words", "words-2", "words-dpo"}
    assert "reward_accuracy" in capsys.readouterr().out
