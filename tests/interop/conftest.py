"""Reference models of transformers, made once for all workers by another Python that has torch."""

import importlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from jaxinfra.models.families import MODULES
from jaxinfra.models.families.common import Family
from jaxinfra.models.transformer import TransformerConfig
from tests.interop.references import TINY
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

ROOT = Path(__file__).parents[2]
TORCH_PYTHON = ROOT / ".venv-transformers/bin/python"

needs_torch = pytest.mark.skipif(
    not TORCH_PYTHON.exists(), reason="`make .venv-transformers` installs torch and transformers there"
)


def published() -> Iterator[tuple[str, Family, TransformerConfig]]:
    """Yields the name, the family and the shape of every published model that has a family."""
    for name in dict.fromkeys(MODULES.values()):
        module = importlib.import_module(f"jaxinfra.models.families.{name}")
        for shape_name, shape in module.SHAPES.items():
            yield shape_name, module.FAMILY, shape


@dataclass(frozen=True)
class References:
    """What transformers makes of the configs in `tests.interop.references`."""

    folder: Path

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Tokens and logits of a tiny model."""
        return dict(np.load(self.folder / f"{name}.npz"))

    def tensors(self, name: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of a published model."""
        found = json.loads((self.folder / "tensors.json").read_text())
        return {tensor: tuple(shape) for tensor, shape in found[name].items()}


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "torch-models"
    with FileLock(f"{folder}.lock"):
        if not (folder / "tensors.json").exists():
            _make(folder)
    return References(folder)


def _make(folder: Path) -> None:
    folder.mkdir()
    configs: dict[str, dict[str, Any]] = {
        name: {"model_type": family.model_type} | family.write(shape) for name, family, shape in published()
    }
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "published.json").write_text(json.dumps(configs))
    script = ROOT / "tests/interop/torch_models.py"
    made = subprocess.run([TORCH_PYTHON, script, folder], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
