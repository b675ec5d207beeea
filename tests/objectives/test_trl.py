"""The losses of DPO, ORPO and KTO and their gradients against TRL's, on the same Llama."""

import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.data.labeled import LabeledData
from jaxinfra.data.pairs import PairData
from jaxinfra.objectives.dpo import DPO, SIDES
from jaxinfra.objectives.kto import KTO
from jaxinfra.objectives.objective import Objective
from jaxinfra.objectives.orpo import ORPO
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


def side(ids: np.ndarray, real: np.ndarray, in_answer: np.ndarray, name: str) -> dict[str, jax.Array]:
    """The arrays of one side of a batch, from those of TRL."""
    positions = np.broadcast_to(np.arange(ids.shape[1] - 1, dtype=np.int32), ids[:, 1:].shape)
    arrays = {
        "inputs": ids[:, :-1].astype(np.int32),
        "targets": ids[:, 1:].astype(np.int32),
        # A position whose target is padding belongs to no document.
        "segments": real[:, 1:].astype(np.int32),
        "positions": positions,
        "weights": in_answer[:, 1:].astype(np.float32),
    }
    return {f"{name}_{field}": jnp.asarray(array) for field, array in arrays.items()}


def compare(trl: dict[str, np.ndarray], name: str, objective: Objective, batch: dict[str, jax.Array]) -> None:
    rows, length = next(iter(batch.values())).shape
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
        name=name,
        model=model,
        objective=objective,
        data=(LabeledData if name == "kto" else PairData)(store="none", seq_len=length),
        init="runs/base",
        precision=Precision(compute="float32"),
        mesh=MeshConfig(fsdp=1),
        train=TrainConfig(global_batch=rows),
    )
    program = Program(run, make_mesh(run.mesh, jax.devices()[:1]))
    with program.on_mesh, jax.default_matmul_precision("highest"):
        roles = ("reference", "trained") if name == "kto" else ("trained", "reference")  # see `trl_dpo`
        trained, reference = (jax.tree.map(jnp.asarray, as_params(trl, role)) for role in roles)
        grads, sums, _ = program.gradients(trained, batch, reference if objective.uses_reference else None)
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(float(trl[f"{name}.loss"]), rel=1e-5)
    wanted = dict(jax.tree.leaves_with_path(as_params(trl, f"{name}.grad")))
    for path, found in jax.tree.leaves_with_path(grads):
        assert relative_error(found, wanted[path]) < 1e-5, jax.tree_util.keystr(path)
    assert sums.get("kl", 1) > 0, "the estimate is not cut off"


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo"])
def test_dpo_is_that_of_trl(trl: dict[str, np.ndarray], loss_type: Any) -> None:
    ids, real, mask = (trl[f"{loss_type}.batch.{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    halves = (np.split(array, 2) for array in (ids, real, mask))
    batch = {k: v for name, *arrays in zip(SIDES, *halves, strict=True) for k, v in side(*arrays, name).items()}
    compare(trl, loss_type, DPO(beta=float(trl["beta"]), loss_type=loss_type), batch)


def test_orpo_is_that_of_trl(trl: dict[str, np.ndarray]) -> None:
    names = ("input_ids", "attention_mask", "labels")
    ids, real, labels = (np.split(trl[f"orpo.batch.concatenated_{name}"], 2) for name in names)
    arrays = zip(SIDES, ids, real, [each >= 0 for each in labels], strict=True)
    batch = {k: v for name, *each in arrays for k, v in side(*each, name).items()}
    compare(trl, "orpo", ORPO(beta=float(trl["beta"])), batch)


def test_kto_is_that_of_trl(trl: dict[str, np.ndarray]) -> None:
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = side(*(trl[f"kto.batch.{name}"] for name in names), "completion")
    batch |= side(*(trl[f"kto.batch.KL_{name}"] for name in names), "mismatched")
    batch["label"] = jnp.asarray(trl["kto.batch.label"], jnp.float32)
    compare(trl, "kto", KTO(beta=float(trl["beta"]), desirable_weight=1.5, undesirable_weight=0.8), batch)
