"""Families with experts: logits and gradients of tiny models are those of transformers, and configs are kept."""

import dataclasses
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from jaxinfra.interop.config_json import ModelJson, read_json
from jaxinfra.interop.folder import open_folder
from jaxinfra.interop.quantized import open_weights, read_quantization
from jaxinfra.interop.reading import check_tensors, read_params
from jaxinfra.interop.safetensors import Weights
from jaxinfra.models.families import family
from jaxinfra.models.families.common import Family
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program
from jaxinfra.run import Precision, TrainConfig
from tests.interop.expert_cases import CASES, GRADIENTS

ROOT = Path(__file__).resolve().parents[2]
TORCH_PYTHON = ROOT / ".venv-torch/bin/python"
needs_torch = pytest.mark.skipif(not TORCH_PYTHON.exists(), reason="needs torch and transformers in .venv-torch")

NAMES = [f"{name}-{i}" for name, cases in CASES.items() for i in range(len(cases))]


def keys_of(name: str) -> dict[str, Any]:
    model_type, _, index = name.rpartition("-")
    return CASES[model_type][int(index)] | {"model_type": model_type}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all models."""
    out = tmp_path_factory.mktemp("models")
    cases = {name: {"config": keys_of(name), "gradients": name.rpartition("-")[0] in GRADIENTS} for name in NAMES}
    command = [TORCH_PYTHON, ROOT / "tests/interop/torch_models.py", out]
    subprocess.run(command, input=json.dumps(cases), text=True, check=True, capture_output=True)
    return out


def program_of(model: TransformerConfig) -> Program:
    mesh = MeshConfig(fsdp=1)
    run = dataclasses.replace(
        quickstart.config(),
        model=dataclasses.replace(model, attention_kernel="reference"),
        mesh=mesh,
        precision=Precision(compute="float32"),
        train=TrainConfig(global_batch=2, steps=1),
    )
    return Program(run, make_mesh(mesh, jax.devices()[:1]))


def params_of(weights: Weights, own: Family, model: TransformerConfig, program: Program) -> Any:
    """Reads parameters as a tree."""
    flat, tree = jax.tree.flatten_with_path(program.params)
    params = {".".join(key.key for key in path): spec for path, spec in flat}
    bindings = own.bindings(model, {path: spec.shape for path, spec in params.items()})
    check_tensors(weights.tensors, bindings, own.unused_by(model), weights.folder.url)
    with program.on_mesh:
        found = read_params(weights, bindings, params)
    return jax.tree.unflatten(tree, [found[path] for path in params])


def assert_is_kept(own: Family, model: TransformerConfig) -> None:
    """A config that is written and read is the same one."""
    keys = ModelJson(json.loads(json.dumps(own.write(model))) | {"model_type": own.model_type})
    assert own.read(keys) == model
    keys.close()


def assert_logits(folder: Path, reference: Mapping[str, np.ndarray], gradients: Path | None = None) -> None:
    """A model has the logits of the reference, and the gradients of a folder; its config is kept."""
    keys = read_json(open_folder(str(folder)))
    own = family(keys.model_type, "")
    model, weights = own.read(keys), open_weights(open_folder(str(folder)), read_quantization(keys))
    keys.close()
    assert_is_kept(own, model)
    program = program_of(model)
    params = params_of(weights, own, model, program)
    tokens = jnp.asarray(reference["tokens"], jnp.int32)

    def logits_of(params: Any) -> jax.Array:
        logits, _ = program.model(params).forward({"inputs": tokens})
        return logits.materialize()

    def loss_of(params: Any) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits_of(params)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

    with program.on_mesh:
        logits = np.asarray(jax.jit(logits_of)(params))
    expected = reference["logits"]
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))
    if gradients is not None:
        wanted = params_of(Weights(open_folder(str(gradients))), own, model, program)
        with program.on_mesh:
            actual = jax.jit(jax.grad(loss_of))(params)
        for (path, want), got in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(actual), strict=True):
            error = np.abs(np.asarray(got) - np.asarray(want)).max()
            assert error <= 1e-5 * max(np.abs(np.asarray(want)).max(), 1e-3), path


@needs_torch
@pytest.mark.slow(60)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_transformers(models: Path, name: str) -> None:
    folder = models / name
    gradients = folder / "gradients"
    assert_logits(folder, np.load(folder / "logits.npz"), gradients if gradients.exists() else None)
