"""The vision transformer against a plain NumPy one, and the sizes of the published ones."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.families.zoo import VISION_SHAPES, vision_shape
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.program import Program
from tests.models.numpy_reference import normalize, tanh_gelu
from tests.parity.cases import MEAN, TOKEN, Case, batch_on_host, put_like, values_on_host

Params = dict[str, Any]


def layer_norm(x_TD: np.ndarray, params: Params, eps: float) -> np.ndarray:
    return np.stack([normalize(x, params, "layernorm", eps, 0.0) for x in x_TD])


def attention(x_TD: np.ndarray, w: Params, heads: int) -> np.ndarray:
    """One head and one query at a time."""
    out = np.broadcast_to(w["out"]["bias"], x_TD.shape).copy()
    for h in range(heads):
        q, k, v = (x_TD @ w[name]["weight"][:, h] + w[name]["bias"][h] for name in ("query", "key", "value"))
        for t in range(len(x_TD)):
            scores = k @ q[t] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[t] += weights @ v / weights.sum() @ w["out"]["weight"][h]
    return out


def logits_of_image(image: np.ndarray, params: Params, config: VisionTransformerConfig) -> np.ndarray:
    """Computes the logits by definition, pixel by pixel, in float64."""
    size, rows = config.patch_size, []
    for top in range(0, config.image_size, size):
        for left in range(0, config.image_size, size):
            pixels = [image[top + i, left + j] for i in range(size) for j in range(size)]
            rows.append(np.concatenate(pixels) @ params["patches"] + params["patches_bias"])
    if config.pool == "class":
        rows.insert(0, params["token"])
    x_TD = np.stack(rows) + params["positions"]
    for number in range(config.num_layers):
        w = jax.tree.map(lambda a, number=number: a[number], params["blocks"])
        y_TD = layer_norm(x_TD, w["attention_norm"], config.norm_eps)
        x_TD = x_TD + attention(y_TD, w["attention"], config.num_heads)
        y_TD = layer_norm(x_TD, w["mlp_norm"], config.norm_eps)
        hidden = tanh_gelu(y_TD @ w["mlp"]["up"]["weight"] + w["mlp"]["up"]["bias"])
        x_TD = x_TD + hidden @ w["mlp"]["down"]["weight"] + w["mlp"]["down"]["bias"]
    x_TD = layer_norm(x_TD, params["norm"], config.norm_eps)
    pooled = x_TD[0] if config.pool == "class" else x_TD.mean(0)
    return pooled @ params["classes"] + params["classes_bias"]


@pytest.mark.parametrize("run", [TOKEN, MEAN], ids=lambda run: run.name)
def test_loss_sums_agree_with_the_definition(run) -> None:
    """Cross-entropy, right answers and weights of a batch, a third of it with weight zero."""
    program, batch = Case(run=run).program(), batch_on_host(TOKEN)
    values = values_on_host(program.specs)
    with program.on_mesh:
        placed = put_like(batch, program.validation_batch)
        sums = program.eval_step(put_like(values, program.params), placed)
    exact = jax.tree.map(lambda a: a.astype(np.float64), values)
    logits = np.stack([logits_of_image(image, exact, run.model) for image in batch["images"].astype(np.float64)])
    of_label = np.take_along_axis(logits, batch["labels"][:, None], axis=1)[:, 0]
    entropy = np.log(np.exp(logits).sum(-1)) - of_label
    weights = batch["weights"]
    assert float(sums["loss"]) == pytest.approx((entropy * weights).sum(), rel=1e-5)
    assert float(sums["accuracy"]) == ((logits.argmax(-1) == batch["labels"]) * weights).sum()
    assert float(sums["weight"]) == weights.sum()


def test_label_smoothing_mixes_the_target_with_all_classes() -> None:
    """The gradient of the smoothed loss is that of the plain one, and that of the mean over all labels."""
    epsilon, classes = 0.25, TOKEN.model.num_classes

    def program_of(smoothing: float) -> Program:
        objective = replace(TOKEN.objective, label_smoothing=smoothing)
        return Case(run=replace(TOKEN, objective=objective)).program()

    def gradients(program: Program, labels: np.ndarray) -> list[np.ndarray]:
        with program.on_mesh:
            batch = put_like({**batch_on_host(TOKEN), "labels": labels}, program.validation_batch)
            grads, *_ = program.gradients(put_like(values_on_host(program.specs), program.params), batch)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(grads)]

    labels = batch_on_host(TOKEN)["labels"]
    one_hot = program_of(0.0)
    plain, smooth = gradients(one_hot, labels), gradients(program_of(epsilon), labels)
    every = [gradients(one_hot, np.full_like(labels, label)) for label in range(classes)]
    for own, mixed, *others in zip(plain, smooth, *every, strict=True):
        expected = (1 - epsilon) * own + epsilon * np.mean(others, axis=0)
        assert np.abs(mixed - expected).max() < 1e-5 * np.abs(own).max() + 1e-7


# Of the published classifiers of 1,000 classes.
PARAMETERS = {"vit-s16": 22_050_664, "vit-b16": 86_567_656, "vit-l16": 304_326_632}


@pytest.mark.parametrize("name", VISION_SHAPES)
def test_published_shapes_have_the_published_parameters(name: str) -> None:
    """Built for 64 abstract devices."""
    mesh = MeshConfig(fsdp=32, tensor=2)
    run = replace(MEAN, model=vision_shape(name), data=replace(MEAN.data, image_size=224), mesh=mesh)
    program = Program(run, abstract_mesh(mesh), "tpu")
    assert program.num_params == PARAMETERS[name]


def test_flops_by_hand() -> None:
    """Two patches of 3 numbers and a class token, width 4, MLP of 5, 6 classes, one layer."""
    shape = VisionTransformerConfig(
        image_size=2, patch_size=1, channels=3, num_classes=6, num_layers=1, hidden_size=4, num_heads=2, mlp_dim=5
    )
    patches, tokens = 4, 5
    products = patches * 3 * 4 + tokens * (4 * 4 * 4 + 2 * 4 * 5) + 4 * 6
    attention = 2 * tokens * tokens * 4  # scores, and the weighted sum of values
    assert shape.build(Partitioner()).flops(MEAN.data) == 3 * 2 * (products + attention)
