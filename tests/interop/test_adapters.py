"""Adapters in the format of PEFT, and models in which they are merged: both compute there what they compute here."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.hub import published
from jaxinfra.hub.adapter import export_adapter
from jaxinfra.hub.export import Export, export_model
from jaxinfra.hub.peft import open_peft
from jaxinfra.hub.published_model import open_published
from jaxinfra.inference.trained_params import load_params, merged_params
from jaxinfra.models.adapter import Lora
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import Params, leaves_by_name, merge_trees, nested
from jaxinfra.processes.peers import current_peers
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.interop.conftest import References, write_tensors
from tests.interop.tiny_llama import tiny_llama
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.models.harness import relative_error
from tests.refusals import refused
from tests.tiny_run import launch


@dataclass(frozen=True, kw_only=True)
class Case:
    """An adapter of a tiny model of transformers; PEFT cannot have one if it has experts."""

    name: str
    adapter: Lora
    has_experts: bool = False


CASES = [
    Case(name="qwen3-tied", adapter=Lora(rank=2, targets=("blocks.attention", "up"), dora=True)),
    Case(name="phi3-grouped", adapter=Lora(rank=3, alpha=6.0)),  # all of the weights in a tensor
    Case(name="phi3-partial", adapter=Lora(rank=2, targets=("value", "query", "up"), dora=True)),  # some of them
    Case(name="gpt2-tied", adapter=Lora(rank=4, alpha=5.0)),  # the inputs are the first dimension
    Case(name="gemma3-grouped", adapter=Lora(rank=2, targets=("layer_1", "tail"))),  # some of the layers
    Case(name="mixtral-0", adapter=Lora(rank=2), has_experts=True),
]


def program_of(folder: Path, adapter: Lora) -> Program:
    """The program of a run that trains an adapter beside a folder, on two devices."""
    source, mesh = f"hf:{folder}", MeshConfig(fsdp=2)
    run = Run(
        name="adapter",
        model=published(source),
        data=TokenData(store="none", seq_len=24),
        init=source,
        adapter=adapter,
        precision=Precision(compute="float32"),
        mesh=mesh,
        train=TrainConfig(global_batch=2),
    )
    return Program(run, make_mesh(mesh, jax.devices()[:2]))


def noisy_params(program: Program) -> Params:
    """The parameters of the base, and random ones of the adapter."""
    assert program.run.init is not None
    base, rng = load_params(program.run.init, program, current_peers()).params, np.random.default_rng(0)
    wanted = leaves_by_name(program.kept(program.params))
    arrays = {path: 0.1 * rng.normal(size=leaf.shape) + path.endswith("magnitude") for path, leaf in wanted.items()}
    placed = {path: jax.device_put(arrays[path].astype("f4"), leaf.sharding) for path, leaf in wanted.items()}
    return merge_trees(base, nested(placed))


def logits_of(program: Program, params: dict, tokens: np.ndarray) -> jax.Array:
    with program.on_mesh, jax.default_matmul_precision("highest"):
        batch = {"inputs": jax.device_put(tokens.astype("int32"), program.engine.batch_spec("sequence"))}
        return jax.jit(lambda params: program.model(params)(batch).materialize())(params)


def torch(task: str, folder: Path) -> None:
    command = [TORCH_PYTHON, Path(__file__).with_name("torch_peft.py"), task, folder]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-3000:]


@needs_torch
@pytest.mark.slow(40)
@pytest.mark.usefixtures("all_optimizations")
def test_peft_and_transformers_compute_the_same(references: References, tmp_path: Path) -> None:
    ours = dict[str, jax.Array]()
    for case in CASES:
        base, folder = open_published(str(references.folder / case.name)), tmp_path / case.name
        program = program_of(references.folder / case.name, case.adapter)
        params = noisy_params(program)
        tokens = references.arrays(case.name)["tokens"]
        ours[case.name] = logits_of(program, params, tokens)
        merged = merged_params(program, params)
        assert relative_error(logits_of(program.base, merged, tokens), ours[case.name]) < 1e-5, case
        assert isinstance(program.run.model, TransformerConfig)
        export = Export(
            config=program.run.model,
            params=merged,
            source={},
            tokenizer=None,
            max_positions=base.max_positions,
            origin=base,
        )
        with program.on_mesh:
            export_model(str(folder / "merged"), export)
            out = str(folder / "adapter")
            if case.has_experts:
                with pytest.raises(ConfigError, match="all experts; leave --adapter out"):
                    export_adapter(out, case.adapter, params, program.base.specs, base, source={})
            else:
                export_adapter(out, case.adapter, params, program.base.specs, base, source={})
        np.save(folder / "tokens.npy", tokens)
    torch("read", tmp_path)
    for case in CASES:
        for kind in ("merged",) if case.has_experts else ("adapter", "merged"):
            theirs = np.load(tmp_path / case.name / f"{kind}.npy")
            assert relative_error(ours[case.name], theirs) < 1e-5, (kind, case)


MADE = {
    "qwen3-tied": {
        "target_modules": "all-linear",
        "r": 3,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 5},
    },
    "qwen3-grouped": {"target_modules": ["q_proj", "down_proj"], "r": 2, "use_dora": True, "layers_to_transform": [1]},
    "phi3-grouped": {"target_modules": ["qkv_proj", "gate_up_proj"], "r": 2, "use_rslora": True},
    "gpt2-tied": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
}


@needs_torch
@pytest.mark.slow(40)
@pytest.mark.usefixtures("all_optimizations")
def test_adapters_of_peft_compute_the_same_here(references: References, tmp_path: Path) -> None:
    for name, options in MADE.items():
        (folder := tmp_path / name).mkdir()
        case = {"base": str(references.folder / name), "options": options}
        (folder / "case.json").write_text(json.dumps(case))
        np.save(folder / "tokens.npy", references.arrays(name)["tokens"])
    torch("make", tmp_path)
    for name in MADE:
        peft = open_peft(str(tmp_path / name / "made"))
        assert peft is not None
        program = program_of(references.folder / name, peft.config)
        params = load_params(f"hf:{tmp_path / name / 'made'}", program, current_peers()).params
        ours = logits_of(program, params, references.arrays(name)["tokens"])
        assert relative_error(ours, np.load(tmp_path / name / "made.npy")) < 1e-5, name
        other = program_of(references.folder / name, Lora(rank=1))
        with pytest.raises(ConfigError, match="another adapter; use adapter=lora adapter.rank="):
            load_params(f"hf:{tmp_path / name / 'made'}", other, current_peers())


@pytest.mark.parametrize(
    ("keys", "tensors", "named"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type=IA3 LORA"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save not supported"),
        ({"base_model_name_or_path": "/nowhere"}, {}, "adapter/adapter_config.json base_model_name_or_path /nowhere"),
        ({"lora_alpha": "many"}, {}, "adapter_config.json ranks alphas"),
        ({"lora_alpha": -1}, {}, "adapter_config.json alpha -1"),
        ({"alpha_pattern": {"(": 2}}, {}, "adapter_config.json ranks alphas"),
        ({}, {"layers.0.self_attn.qq_proj.lora_A.weight": (2, 16)}, "qq_proj no place nearest q_proj"),
    ],
)
def test_adapters_that_are_none_here_are_refused(
    keys: dict, tensors: dict[str, tuple[int, ...]], named: str, tmp_path: Path
) -> None:
    base, adapter = tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    sound = {f"layers.0.self_attn.q_proj.lora_{name}.weight": shape for name, shape in (("A", (2, 16)), ("B", (16, 2)))}
    arrays = {f"base_model.model.model.{name}": np.ones(shape, "f4") for name, shape in (sound | tensors).items()}
    write_tensors(adapter, arrays, "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config | keys))
    refused(launch("sample", f"hf:{adapter}", "w1"), named)
    refused(launch("sample", str(adapter), "w1"), f"hf:{adapter}")
