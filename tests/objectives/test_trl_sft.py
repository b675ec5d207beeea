"""Tokens, loss and gradients of supervised fine-tuning against TRL's, in the chat templates of five models."""

import functools
import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.data.tokens import TokenData
from jaxinfra.ops.rope import Rope
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.prepare.documents.encoding import encode_documents
from jaxinfra.prepare.documents.formats import Chat
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import decoder
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.models.harness import relative_error
from tests.objectives.test_trl import HEADS, KV_HEADS, as_params

pytestmark = [needs_torch, pytest.mark.slow(20)]


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trl")
    script = Path(__file__).with_name("trl_sft.py")
    subprocess.run([TORCH_PYTHON, script, out], check=True, capture_output=True)
    return out


@pytest.mark.parametrize("name", ["llama3", "phi3", "qwen3", "glm4moe", "deepseekv3"])
def test_conversations_are_trained_on_as_by_trl(trl: Path, name: str) -> None:
    """With several turns, system messages, calls of tools, and reasoning, where the template has a place for them."""
    folder = trl / f"{name}_training"
    arrays = dict(np.load(folder / "sft.npz"))
    tokenizer = JsonTokenizer.from_bytes((folder / "tokenizer.json").read_bytes(), "</s>", name)
    format = Chat(template=f"{folder}/chat_template.jinja")
    records = map(json.loads, (folder / "talks.jsonl").read_text().splitlines())
    documents = encode_documents(tokenizer, [format.to_documents(record)[0] for record in records])
    ids_BT, labels_BT, real_BT = (arrays[f"batch.{field}"] for field in ("input_ids", "labels", "attention_mask"))
    for document, ids_T, labels_T, real_T in zip(documents, ids_BT, labels_BT, real_BT, strict=True):
        assert document.ids_N.tolist() == ids_T[real_T == 1].tolist()
        assert document.in_loss_N.tolist() == (labels_T[real_T == 1] >= 0).tolist()
    wanted = dict(jax.tree.leaves_with_path(as_params(arrays, "grad")))
    params = as_params(arrays, "trained")
    program = small_llama()
    # A row for each document, and one for all of them.
    for row_of, shape in ((range(len(documents)), (5, 576)), ([0] * len(documents), (1, 1024))):
        batch = rows([(document.ids_N, document.in_loss_N) for document in documents], row_of, shape)
        with program.on_mesh, jax.default_matmul_precision("highest"):
            grads, sums, _ = program.gradients(jax.tree.map(jnp.asarray, params), batch)
        assert float(sums["loss"] / sums["weight"]) == pytest.approx(float(arrays["loss"]), rel=1e-6)
        for path, found in jax.tree.leaves_with_path(grads):
            assert relative_error(found, wanted[path]) < 1e-5, jax.tree_util.keystr(path)


@functools.cache
def small_llama() -> Program:
    """The program of all templates, so that it is compiled once."""
    run = Run(
        name="sft",
        model=decoder(
            vocab_size=300,
            num_layers=2,
            hidden_size=16,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            mlp_dim=24,
            norm_eps=1e-5,
            rope=Rope(theta=10000.0),
        ),
        data=TokenData(store="none", seq_len=1),
        precision=Precision(compute="float32"),
        mesh=MeshConfig(fsdp=1),
        train=TrainConfig(global_batch=1),
    )
    return Program(run, make_mesh(run.mesh, jax.devices()[:1]))


def rows(
    documents: list[tuple[np.ndarray, np.ndarray]], row_of: range | list[int], shape: tuple[int, int]
) -> dict[str, jax.Array]:
    """A batch `[B, T]` with these documents, each at the end of the row that it is in."""
    types = {
        "inputs": np.int32,
        "targets": np.int32,
        "segments": np.int32,
        "positions": np.int32,
        "weights": np.float32,
    }
    batch, ends = {field: np.zeros(shape, dtype) for field, dtype in types.items()}, [0] * shape[0]
    for number, ((ids_N, in_loss_N), row) in enumerate(zip(documents, row_of, strict=True)):
        count, start = len(ids_N) - 1, ends[row]
        values = (ids_N[:-1], ids_N[1:], number + 1, np.arange(count), in_loss_N[1:])
        for field, value in zip(types, values, strict=True):
            batch[field][row, start : start + count] = value
        ends[row] += count
    return {field: jnp.asarray(value) for field, value in batch.items()}
