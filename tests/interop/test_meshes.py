"""Published weights have the same bits on every mesh, and are written with the same bytes from each."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.families.registry import family
from jaxinfra.hub.export import Export, export_model
from jaxinfra.hub.params import load_published
from jaxinfra.hub.published_model import open_published
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import leaves_by_name
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.interop.expert_cases import EXPERTS
from tests.interop.references import TINY
from tests.several import all_ended, several_scripts

MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=4, fsdp=2),
    "expert": MeshConfig(expert=4, fsdp=2),
    "stage": MeshConfig(stage=2, expert=2, fsdp=2),
}
SIZES = {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 96, "head_dim": 8}
_TWO_KINDS = {"attention_k_eq_v": True, "global_head_dim": 16, "num_global_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "gemma4": TINY["gemma4-untied"] | SIZES | _TWO_KINDS,
    "mixtral": EXPERTS["mixtral-0"] | SIZES | {"num_local_experts": 8},
    # Gates and inputs alternate in one tensor, and layers are unlike.
    "gpt_oss": EXPERTS["gpt_oss-0"] | SIZES | {"num_local_experts": 8, "num_hidden_layers": 4},
    "llama4": EXPERTS["llama4_text-1"] | SIZES | {"num_local_experts": 8, "num_hidden_layers": 8},
    "qwen3_next": EXPERTS["qwen3_next-1"]
    | SIZES
    | {"num_experts": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    "qwen3_5": EXPERTS["qwen3_5_text-0"] | SIZES | {"linear_num_key_heads": 4, "linear_num_value_heads": 8},
    "qwen3_5_moe": EXPERTS["qwen3_5_moe_text-1"]
    | SIZES
    | {"num_experts": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
}


def make_program(config: TransformerConfig, mesh: MeshConfig) -> Program:
    run = Run(
        name="x",
        model=config,
        data=TokenData(store="none", seq_len=8),
        precision=Precision(compute="float32"),
        mesh=mesh,
        train=TrainConfig(global_batch=8),
    )
    return Program(run, make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes)]))


def load(folder: Path, mesh: MeshConfig) -> tuple[Program, Any]:
    program = make_program(open_published(f"hf:{folder}").config, mesh)
    with program.on_mesh:
        return program, load_published(f"hf:{folder}", program.run.model, program.params)[0]


def write(program: Program, params: Any, out: Path) -> bytes:
    with program.on_mesh:
        model = program.run.model
        assert isinstance(model, TransformerConfig)
        export_model(str(out), Export(config=model, params=params, source={}, tokenizer=None, max_positions=64))
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes random parameters from one device, and returns them with their folder and its bytes."""

    @cache
    def export(name: str) -> tuple[Path, dict[str, np.ndarray], bytes]:
        keys = {key: value for key, value in MODELS[name].items() if key != "gradients"}
        config = family(keys["model_type"], "").read(ModelJson(keys))
        program = make_program(config, MeshConfig(fsdp=1))
        draw = np.random.default_rng(0)
        params = jax.tree.map(
            lambda spec: jax.device_put(draw.standard_normal(spec.shape, np.float32), spec.sharding), program.params
        )
        out = tmp_path_factory.mktemp("meshes") / name
        content = write(program, params, out)
        return out, {path: np.asarray(leaf) for path, leaf in leaves_by_name(params).items()}, content

    return export


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("mixtral", "expert"),
        ("gpt_oss", "fsdp"),
        ("gpt_oss", "stage"),
        ("llama4", "expert"),
        ("llama4", "tensor"),
        ("gemma4", "tensor"),
        ("qwen3_next", "stage"),
        ("qwen3_next", "tensor"),
        ("qwen3_5", "tensor"),
        ("qwen3_5_moe", "expert"),
    ],
)
def test_same_bits_on_every_mesh(exported: Any, tmp_path: Path, model: str, mesh: str) -> None:
    folder, expected, content = exported(model)
    program, params = load(folder, MESHES[mesh])
    found = leaves_by_name(params)
    assert found.keys() == expected.keys()
    assert any(not leaf.sharding.is_fully_replicated for leaf in found.values())
    for path, leaf in found.items():
        assert np.array_equal(np.asarray(leaf), expected[path]), path
    assert write(program, params, tmp_path / "out") == content


SCRIPT = """
import json, sys
import jax, jaxinfra
jaxinfra.join()
from jaxinfra.hub.published_model import open_published
from jaxinfra.interop.reading import read_params
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import leaves_by_name
from tests.interop.test_meshes import make_program
model = open_published(sys.argv[1])
program = make_program(model.config, MeshConfig(fsdp=4))
weights, params = model.check(), leaves_by_name(program.params)
bindings = model.bindings({path: each.shape for path, each in params.items()}, weights)
with program.on_mesh:
    found = jax.block_until_ready(read_params(weights, bindings, params))
print(json.dumps([weights.bytes_read, sum(leaf.nbytes for leaf in found.values())]))
"""


@pytest.mark.slow(25)
@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"])
def test_four_processes_read_a_quarter_each(exported: Any, model: str) -> None:
    folder, _, _ = exported(model)
    with several_scripts(SCRIPT, f"hf:{folder}", count=4) as children:
        ends = all_ended(children)
    assert [each.code for each in ends] == [0] * 4, ends
    for each in ends:
        read, total = json.loads(each.out.splitlines()[-1])
        assert 0 < read <= 1.1 * total / 4
