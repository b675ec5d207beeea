"""CONTRIBUTING.md names the layers that `make lint` checks, and these hold all modules."""

import re
import tomllib

from tests.conftest import ROOT

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
(LINES,) = (contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")
LAYERS = [{name.removeprefix("jaxinfra.") for name in line.split(" | ")} for line in LINES]


def test_the_layers_are_those_that_are_checked() -> None:
    (text,) = re.findall(r"`(launch -> [^`]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert [{*re.findall(r"\w+", layer)} for layer in text.split("->")] == LAYERS


def test_each_module_is_in_a_layer() -> None:
    paths = [path for path in (ROOT / "jaxinfra").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert {path.stem for path in paths} - {"__init__"} == set().union(*LAYERS) - {"launch"}
