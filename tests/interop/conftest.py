"""Reference models of transformers, made once for all workers by another Python that has torch."""

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

from jaxinfra.families.common import Family
from jaxinfra.families.registry import family, family_modules
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.folder import open_folder
from jaxinfra.interop.safetensors import WEIGHTS, Weights, header_of
from jaxinfra.models.transformer import TransformerConfig
from tests.interop.references import TINY
from tests.interop.torch_python import TORCH_PYTHON
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data


def published() -> Iterator[tuple[str, Family, TransformerConfig]]:
    """Yields the name, the family and the shape of every published model that has a family."""
    for module in family_modules():
        for shape_name, shape in module.SHAPES.items():
            yield shape_name, module.FAMILY, shape


@dataclass(frozen=True)
class References:
    """The outputs of transformers for the configs in `tests.interop.references`."""

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
            make_references(folder, TINY, {name: write(of, shape) for name, of, shape in published()})
    return References(folder)


def written_again(keys: dict[str, Any]) -> dict[str, Any] | None:
    """Writes the keys of a config anew; None for a model with images, of which only the text part is written."""
    if "vision_config" in keys:
        return None
    of = family(keys["model_type"], "")
    return {"model_type": of.model_type, "pad_token_id": None} | of.write(of.read(ModelJson(keys)))


def read_tensor(weights: Weights, name: str) -> np.ndarray:
    """Reads a whole tensor."""
    tensor = weights.tensors[name]
    out = np.empty(tensor.shape, tensor.dtype)
    weights.read_into(name, 0, out.reshape(-1) if not tensor.shape else out)
    return out


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a folder."""
    weights = Weights(open_folder(str(folder)))
    return {name: read_tensor(weights, name) for name in weights.tensors}


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], file: str = WEIGHTS) -> None:
    """Writes a file of weights."""
    header, _ = header_of((name, array.dtype, array.shape) for name, array in tensors.items())
    (folder / file).write_bytes(header + b"".join(array.tobytes() for array in tensors.values()))


def content(folder: Path) -> dict[str, bytes]:
    """Returns the dtype, the shape and the bytes of each tensor of a folder."""
    tensors = read_tensors(folder)
    return {name: repr((array.dtype, array.shape)).encode() + array.tobytes() for name, array in tensors.items()}


def write(of: Family, shape: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a model, with those of every model."""
    return {"model_type": of.model_type} | of.write(shape)


def make_references(folder: Path, tiny: dict[str, dict[str, Any]], published: dict[str, dict[str, Any]]) -> None:
    """Writes the outputs of tiny models, and the names of the tensors of published ones, by their configs."""
    folder.mkdir(exist_ok=True)  # what failed before is there
    tiny = {name: keys | {"written": written_again(keys)} for name, keys in tiny.items()}
    (folder / "tiny.json").write_text(json.dumps(tiny))
    (folder / "published.json").write_text(json.dumps(published))
    script = Path(__file__).with_name("torch_models.py")
    made = subprocess.run([TORCH_PYTHON, script, folder], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
