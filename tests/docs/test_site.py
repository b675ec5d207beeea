"""The site of `make docs`: it builds without warnings, works without a network, and has every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxinfra

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"<(?:link|script|img|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--quiet", "--strict", "--config-file", ".mkdocs.yml", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow(10)
def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(pages) > 10
    assert {str(path): found[0] for path in pages if (found := LOADED.search(path.read_text()))} == {}


@pytest.mark.slow(10)
def test_links_of_pages_lead_somewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        for target in re.findall(r"<a\b[^>]*href=\"([^\"#:/]+\.html)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


@pytest.mark.slow(10)
def test_the_api_page_has_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text()
    shown = set(re.findall(r'id="jaxinfra\.(\w+)"', page))
    assert shown >= {name for name in jaxinfra.__all__}
