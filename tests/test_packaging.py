"""Checks the version, the image, the pre-commit hooks and the issue forms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import jaxinfra
from jaxinfra.registry.sbom import Package, bill_of_materials
from tests.launchers.test_manifests import job_spec

ROOT = Path(__file__).parents[1]


def test_the_version_has_one_place() -> None:
    assert jaxinfra.__version__ in (ROOT / "jaxinfra/__init__.py").read_text()
    assert f"## {jaxinfra.__version__.partition('.dev')[0]}" in (ROOT / "docs/changelog.md").read_text()


def test_the_image_is_made_as_its_linter_wants() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, ROOT / "launch/Dockerfile"], check=True)
    subprocess.run(["bash", "-n", ROOT / "launch/image.sh"], check=True)


def test_the_image_runs_as_the_user_of_pods() -> None:
    """A number, as `runAsNonRoot` cannot tell by a name."""
    last = (ROOT / "launch/Dockerfile").read_text().rpartition("\nFROM ")[2]
    users = [line.split()[1] for line in last.splitlines() if line.startswith("USER ")]
    security = job_spec("job", "cpu:1")["template"]["spec"]["securityContext"]
    assert users == [str(security["runAsUser"])]


def test_an_image_of_another_kind_is_refused_in_one_line() -> None:
    """Before anything is installed."""
    ended = subprocess.run(
        ["make", "--no-print-directory", "image", "KIND=gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2 and not ended.stdout
    (line,) = ended.stderr.splitlines()
    assert "KIND=gpu: expected cpu, cuda or tpu" in line
    ended = subprocess.run([ROOT / "launch/image.sh", "gpu"], capture_output=True, text=True)
    assert ended.returncode == 81 and ended.stderr == "error: KIND=gpu: expected cpu, cuda or tpu\n"


def test_a_bill_of_materials_lists_packages_of_python_and_debian() -> None:
    packages = [Package("pypi", "numpy", "2.5.5"), Package("deb", "libc6", "2.41-12+deb13u4", "debian")]
    written = bill_of_materials("image", packages).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(written) is None
    urls = {component["purl"] for component in json.loads(written)["components"]}
    assert urls == {"pkg:pypi/numpy@2.5.5", "pkg:deb/debian/libc6@2.41-12%2Bdeb13u4"}


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
