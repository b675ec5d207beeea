"""Finds the tools that check machines as code, in an environment of their own."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "launch/infra"
TOOLS = ROOT / ".venv-infra"

needs_tools = pytest.mark.skipif(
    not (TOOLS / ".installed").exists(),
    reason="`make infra` installs what reads Terraform and Ansible into .venv-infra",
)
