from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.config import load
from jaxinfra.inference.language_model import require_text
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.program import Program
from jaxinfra.run import Run
from tests.bench.baseline import loss_fn, make_train_step
from tests.bench.measure import baseline_config
from tests.bench.torch_side import TorchStep
from tests.interop.torch_python import needs_torch

TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.layers.mixer.num_heads=4",
    "model.layers.mlp.dim=64",
    "model.vocab_size=128",
    "data.seq_len=16",
    "train.global_batch=4",
    "mesh.fsdp=1",
]
PARAMS = {
    "attention_norm": ("blocks", "attention_norm", "scale"),
    "query": ("blocks", "attention", "query", "weight"),
    "key": ("blocks", "attention", "key", "weight"),
    "value": ("blocks", "attention", "value", "weight"),
    "out": ("blocks", "attention", "out", "weight"),
    "mlp_norm": ("blocks", "mlp_norm", "scale"),
    "gate": ("blocks", "mlp", "gate", "weight"),
    "up": ("blocks", "mlp", "up", "weight"),
    "down": ("blocks", "mlp", "down", "weight"),
    "embedding": ("embedding",),
    "norm": ("norm", "scale"),
    "head": ("unembedding",),
}


def baseline_names(params):
    """Renames the nested parameters of a program to those of the baseline."""
    renamed = {}
    for name, path in PARAMS.items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        renamed[name] = np.asarray(leaf)
    return renamed


@pytest.fixture(scope="module")
def run(request) -> Run:
    return load(request.config.rootpath / "configs" / "bench_small.py", TINY, root=Run).run


@pytest.fixture(scope="module")
def tokens_BW(run: Run) -> np.ndarray:
    model, data = require_text(run)
    shape = (run.train.global_batch, data.seq_len + 1)
    return np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)


@pytest.fixture(scope="module")
def jaxinfra_result(run: Run, tokens_BW: np.ndarray):
    """Returns parameters, loss and gradients of jaxinfra, under the names of the baseline."""
    program = Program(run, make_mesh(run.mesh, jax.devices()[:1]))
    with program.on_mesh:
        params = program.init(jax.random.key(0)).params
        arrays = {"inputs": tokens_BW[:, :-1], "targets": tokens_BW[:, 1:]}
        batch = {name: jax.device_put(array, program.batch[name].sharding) for name, array in arrays.items()}
        grads, sums, _ = program.gradients(params, batch)
    return baseline_names(params), float(sums["loss"] / sums["weight"]), baseline_names(grads)


@pytest.mark.parametrize("naive", [False, True], ids=["fast", "naive"])
def test_baseline_loss_and_gradients(run: Run, tokens_BW: np.ndarray, jaxinfra_result, naive: bool) -> None:
    params, loss, grads = jaxinfra_result
    config = baseline_config(run, naive_matmul=naive)
    baseline_loss, baseline_grads = jax.jit(jax.value_and_grad(loss_fn), static_argnums=2)(params, tokens_BW, config)
    assert float(baseline_loss) == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(baseline_grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)


@needs_torch
@pytest.mark.slow(10)
def test_pytorch_computes_the_same(run: Run, jaxinfra_result, tmp_path: Path) -> None:
    """The loss of the same parameters, and after a step of AdamW."""
    params, loss, _ = jaxinfra_result
    config = baseline_config(run)
    np.savez(tmp_path / "params.npz", **params)
    step, _, opt_state, batch = make_train_step(config, 1)
    params, _, _ = step({name: jnp.asarray(each) for name, each in params.items()}, opt_state, batch)
    torch = TorchStep(config, "eager", [str(tmp_path / "params.npz")])
    assert torch.time() > 0 and torch.loss == pytest.approx(loss, rel=1e-5)
    assert torch.time() > 0 and torch.loss == pytest.approx(float(loss_fn(params, batch, config)), rel=1e-5)
    torch.close()


def test_sharded_baseline_has_the_same_loss(run: Run) -> None:
    config = baseline_config(run)
    losses = []
    for num_devices in (1, 4):
        step, params, opt_state, batch = make_train_step(config, num_devices)
        params, opt_state, _ = step(params, opt_state, batch)
        losses.append(float(step(params, opt_state, batch)[2]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
