"""The DPO loss and its gradients against TRL's, on the same Llama."""

import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.data.pairs import PairData
from jaxinfra.objectives.dpo import DPO, SIDES
from jaxinfra.ops.rope import Rope
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import decoder
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.models.harness import relative_error

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4

pytestmark = [needs_torch, pytest.mark.slow(10)]


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("trl") / "dpo.npz"
    script = Path(__file__).with_name("trl_dpo.py")
    subprocess.run([TORCH_PYTHON, script, out], check=True, capture_output=True)
    return dict(np.load(out))


def as_params(arrays: dict[str, np.ndarray], role: str) -> dict[str, Any]:
    """A Llama's weights, or their gradients, under the names and in the shapes of `TransformerConfig`."""

    def layers(name: str, change: Any) -> np.ndarray:
        return np.stack([change(arrays[f"{role}.model.layers.{n}.{name}.weight"]) for n in (0, 1)])

    def heads(count: int) -> Any:
        return lambda weight: weight.T.reshape(-1, count, HEAD_DIM)

    attention, mlp = "self_attn", "mlp"
    return {
        "embedding": arrays[f"{role}.model.embed_tokens.weight"],
        "unembedding": arrays[f"{role}.lm_head.weight"].T,
        "norm": {"scale": arrays[f"{role}.model.norm.weight"]},
        "blocks": {
            "attention_norm": {"scale": layers("input_layernorm", np.asarray)},
            "mlp_norm": {"scale": layers("post_attention_layernorm", np.asarray)},
            "attention": {
                "query": {"weight": layers(f"{attention}.q_proj", heads(HEADS))},
                "key": {"weight": layers(f"{attention}.k_proj", heads(KV_HEADS))},
                "value": {"weight": layers(f"{attention}.v_proj", heads(KV_HEADS))},
                "out": {"weight": layers(f"{attention}.o_proj", lambda w: w.T.reshape(HEADS, HEAD_DIM, -1))},
            },
            "mlp": {
                ours: {"weight": layers(f"{mlp}.{theirs}", np.transpose)}
                for ours, theirs in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))
            },
        },
    }


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo"])
def test_loss_and_gradients_are_those_of_trl(trl: dict[str, np.ndarray], loss_type: Any) -> None:
    ids, mask, real = (trl[f"{loss_type}.batch.{name}"] for name in ("input_ids", "completion_mask", "attention_mask"))
    pairs, length = len(ids) // 2, ids.shape[1] - 1
    model = decoder(
        vocab_size=32,
        num_layers=2,
        hidden_size=16,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        mlp_dim=24,
        norm_eps=1e-5,
        rope=Rope(theta=10000.0),
    )
    run = Run(
        name="dpo",
        model=model,
        objective=DPO(beta=float(trl["beta"]), loss_type=loss_type),
        data=PairData(store="none", seq_len=length),
        init="runs/base",
        precision=Precision(compute="float32"),
        mesh=MeshConfig(fsdp=1),
        train=TrainConfig(global_batch=pairs),
    )
    batch: dict[str, jax.Array] = {}
    for n, side in enumerate(SIDES):
        rows = slice(n * pairs, (n + 1) * pairs)
        batch |= {
            f"{side}_inputs": jnp.asarray(ids[rows, :-1], jnp.int32),
            f"{side}_targets": jnp.asarray(ids[rows, 1:], jnp.int32),
            f"{side}_segments": jnp.asarray(real[rows, :-1], jnp.int32),
            f"{side}_positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (pairs, length)),
            f"{side}_weights": jnp.asarray(mask[rows, 1:], jnp.float32),
        }
    program = Program(run, make_mesh(run.mesh, jax.devices()[:1]))
    with program.on_mesh, jax.default_matmul_precision("highest"):
        trained, reference = (jax.tree.map(jnp.asarray, as_params(trl, role)) for role in ("trained", "reference"))
        grads, sums, _ = program.gradients(trained, batch, reference)
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(float(trl[f"{loss_type}.loss"]), rel=1e-5)
    wanted = dict(jax.tree.leaves_with_path(as_params(trl, f"{loss_type}.grad")))
    for path, found in jax.tree.leaves_with_path(grads):
        assert relative_error(found, wanted[path]) < 1e-5, jax.tree_util.keystr(path)
