"""Pages and tables that follow from the code are up to date; `python tests/golden/write.py docs` writes them."""

from pathlib import Path

import pytest

from tests.golden.pages import ROOT, pages


@pytest.fixture(scope="module")
def generated() -> dict[Path, str]:
    return pages()


@pytest.mark.parametrize(
    "name",
    ["docs/configs.md", "docs/models.md", "jaxinfra/config/field_paths.json", "jaxinfra/families/catalog.json"],
)
def test_generated_files_are_up_to_date(name: str, generated: dict[Path, str]) -> None:
    assert (ROOT / name).read_text() == generated[ROOT / name], "run python tests/golden/write.py docs"
