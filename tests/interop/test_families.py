"""Every family computes what transformers computes, under the published names."""

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxinfra.families.common import Family
from jaxinfra.hub.export import Export, export_model
from jaxinfra.hub.published_model import open_published, param_shapes
from jaxinfra.interop.config_json import CONFIG, read_json
from jaxinfra.interop.folder import open_folder
from jaxinfra.interop.quantized import open_weights, read_quantization
from jaxinfra.interop.reading import read_params
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.spec import leaves_by_name
from tests.interop.conftest import References, content, published
from tests.interop.references import TINY
from tests.interop.torch_python import needs_torch
from tests.models.harness import BuiltDecoder, build, relative_error

PUBLISHED = {name: (of, shape) for name, of, shape in published()}


def read_tiny(folder: Path) -> tuple[Family, BuiltDecoder]:
    """Reads a config, checks the tensors of its folder, and builds its model on one device."""
    found = open_published(f"hf:{folder}")
    found.check()
    return found.family, build(config=replace(found.config, attention_kernel="reference"))


def read_weights(folder: Path, found: Family, built: BuiltDecoder) -> dict[str, Any]:
    """Reads the parameters of a model, or their gradients, which are stored in the same form."""
    opened = open_folder(str(folder))
    is_model = opened.exists(CONFIG)
    weights = open_weights(opened, read_quantization(read_json(opened)) if is_model else None)
    specs = leaves_by_name(built.specs)
    bindings = found.bindings(built.config, {path: spec.shape for path, spec in specs.items()}, weights.tensors)
    params = {}
    for path, spec in specs.items():
        sharding = NamedSharding(built.mesh, built.partitioner.stored_spec("", spec))
        params[path] = jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding)
    arrays = read_params(weights, bindings, params)
    return jax.tree.unflatten(jax.tree.structure(built.specs), [arrays[path] for path in specs])


def logits_of(folder: Path, **batch: np.ndarray) -> tuple[jax.Array, BuiltDecoder, Any]:
    """Reads a model; returns its logits of a batch, `[B, T, V]`, the model and its parameters."""
    found, built = read_tiny(folder)
    with jax.set_mesh(built.mesh), jax.default_matmul_precision("highest"):
        params = read_weights(folder, found, built)
        placed = {name: built.put_rows(array.astype("int32")) for name, array in batch.items()}
        logits = jax.jit(lambda params, batch: built.model(params)(batch).materialize())(params, placed)
    return logits, built, params


def stored(folder: Path) -> dict[str, bytes]:
    """Dtype, shape and bytes of each tensor, but for those of images."""
    images = (
        "vision_tower.",
        "vision_model.",
        "multi_modal_projector.",
        "model.visual.",
        "model.vision_tower.",
        "model.embed_vision.",
    )
    text = {name: each for name, each in content(folder).items() if not name.startswith(images)}
    return {
        name.removeprefix("language_model.").replace("model.language_model.", "model."): each
        for name, each in text.items()
    }


@needs_torch
@pytest.mark.slow(2)
@pytest.mark.parametrize("name", TINY)
def test_logits_and_gradients_are_those_of_transformers(references: References, name: str, tmp_path: Path) -> None:
    folder, expected = references.folder / name, references.arrays(name)
    found, built = read_tiny(folder)

    def loss(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = built.model(params)({"inputs": tokens}).materialize()
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen), logits

    with jax.set_mesh(built.mesh), jax.default_matmul_precision("highest"):
        params = read_weights(folder, found, built)
        options = {"tokenizer": None, "max_positions": 64, "model_type": found.model_type}
        export_model(str(tmp_path / "out"), Export(config=built.config, params=params, source={}, **options))
        tokens = built.put_rows(expected["tokens"].astype("int32"))
        if "gradients" not in TINY[name]:
            _, logits = jax.jit(loss)(params, tokens)
        else:
            grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params, tokens)
            wanted = dict(jax.tree.leaves_with_path(read_weights(references.folder / f"{name}.grads", found, built)))
            # Gradients that are zero but for rounding, such as of the bias of keys, are compared with others.
            least = 1e-3 * max(float(jnp.abs(grad).max()) for grad in wanted.values())
            for path, grad in jax.tree.leaves_with_path(grads):
                largest = max(float(jnp.abs(wanted[path]).max()), least)
                assert float(jnp.abs(grad - wanted[path]).max()) < 1e-4 * largest, jax.tree_util.keystr(path)
    assert relative_error(logits, expected["logits"]) < 1e-5
    assert (logits.argmax(-1) == expected["logits"].argmax(-1)).all()
    assert stored(tmp_path / "out") == stored(folder)
    if "rewritten" in expected:
        assert relative_error(expected["rewritten"], expected["logits"]) < 1e-6


@needs_torch
@pytest.mark.slow(1)
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_published_models_are_those_of_transformers(references: References, name: str) -> None:
    assert tensors(*PUBLISHED[name]) == references.tensors(name)


def tensors(of: Family, shape: TransformerConfig, stored: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the checkpoint of a model; `stored` are names that it has."""
    bindings = of.bindings(shape, param_shapes(shape), stored)
    return {name: binding.shape for binding in bindings for name in binding.names}
