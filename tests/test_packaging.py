"""Checks the version, the Dockerfile, the pre-commit hooks and the issue forms."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import jaxinfra

ROOT = Path(__file__).parents[1]
BUILDER = next((name for name in ("docker", "podman") if shutil.which(name)), None)


def test_the_version_has_one_place() -> None:
    assert jaxinfra.__version__ in (ROOT / "jaxinfra/__init__.py").read_text()
    assert f"## {jaxinfra.__version__.partition('.dev')[0]}" in (ROOT / "docs/changelog.md").read_text()


@pytest.mark.skipif(BUILDER is None, reason="neither docker nor podman is installed")
@pytest.mark.slow(400)
def test_the_image_builds_and_is_not_root() -> None:
    """Needs a registry that has the image of Python."""
    assert BUILDER is not None
    image = "jaxinfra-test"
    build = [BUILDER, "build", "--file", "launch/Dockerfile", "--tag", image, "."]
    subprocess.run(build, cwd=ROOT, check=True)
    user = subprocess.run([BUILDER, "run", "--rm", image, "id", "-un"], capture_output=True, text=True, check=True)
    assert user.stdout.strip() == "trainer"


def test_the_image_is_made_as_its_linter_wants() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, ROOT / "launch/Dockerfile"], check=True)


def test_hooks_run_what_lint_runs() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repo["hooks"]}
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert {line.split()[0].removeprefix("$(BIN)/") for line in lint.splitlines()[1:]} == tools


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda form: form.name
)
def test_forms_of_issues_have_unique_fields(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    ids = [field["id"] for field in content["body"]]
    assert {"name", "description", "body"} <= content.keys() and len(set(ids)) == len(ids)
