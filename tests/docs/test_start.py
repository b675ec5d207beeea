"""The files that docs/start.md shows are those that `new` writes, with the change that the page names."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfra.cli.main import main
from jaxinfra.config import diff, load
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey, LastDocuments
from jaxinfra.run import Run

BLOCKS = re.findall(
    r"^```python\n(\"\"\".*?)^```$", (Path(__file__).parents[2] / "docs/start.md").read_text(), re.MULTILINE | re.DOTALL
)
GPL_BYTES = 35_149  # of each file of the page's example


def test_the_files_of_the_page_are_those_that_new_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, config = BLOCKS
    monkeypatch.chdir(tmp_path)
    Path("mytext").mkdir()
    for number in range(30):
        Path(f"mytext/{number}.txt").write_text("x" * GPL_BYTES)
    assert main(["new", "mytext", "--name", "story"]) == 0
    Path("shown.py").write_text(config)
    assert diff(load("shown.py", root=Run).run, load("configs/story.py", root=Run).run) == []
    Path("shown_recipe.py").write_text(recipe)
    shown = load("shown_recipe.py", root=Corpus).run
    assert shown.validation == ByKey(fraction=0.1)
    written = load("configs/data/story.py", root=Corpus).run
    assert diff(replace(shown, validation=LastDocuments(), on_bad="skip"), written) == []
