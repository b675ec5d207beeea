"""The Python that has torch, transformers, TRL and lm-eval, in an environment of its own."""

from pathlib import Path

import pytest

TORCH_PYTHON = Path(__file__).parents[2] / ".venv-transformers/bin/python"

needs_torch = pytest.mark.skipif(
    not TORCH_PYTHON.exists(), reason="`make test-slow` installs torch and others into .venv-transformers"
)
