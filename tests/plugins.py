"""Puts the package of docs/extend.md on the path, as `pip install` does: a folder, and one with its entry points."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfra.plugins import plugins

PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text()
FILES = dict(re.findall(r"^```(?:python|toml)\n# (extras/\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the package is installed into."""
    folder = tmp_path / "site"
    (folder / "extras").mkdir(parents=True)
    for path, content in FILES.items():
        installed = folder / path.removeprefix("extras/")
        installed.write_text(content)
    project = tomllib.loads(FILES["extras/pyproject.toml"])["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in each.items()) for group, each in groups]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    plugins.cache_clear()
    yield folder
    plugins.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "extras"]:
        del sys.modules[name]
