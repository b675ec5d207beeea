"""The Python that has torch, transformers and TRL, in an environment of its own."""

from pathlib import Path

import pytest

TORCH_PYTHON = Path(__file__).parents[2] / ".venv-transformers/bin/python"

needs_torch = pytest.mark.skipif(
    not TORCH_PYTHON.exists(), reason="`make test-slow` installs torch, transformers and TRL into .venv-transformers"
)
