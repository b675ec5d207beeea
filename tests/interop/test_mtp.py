"""Modules for multi-token prediction are read and written under their published names, and compute the same there."""

import json
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.families.registry import family
from jaxinfra.hub.export import Export, export_model, family_of
from jaxinfra.hub.params import load_published
from jaxinfra.hub.published_model import open_published
from jaxinfra.interop.config_json import CONFIG, ModelJson
from jaxinfra.models.transformer import MultiTokenPrediction
from jaxinfra.ops.mtp import MTP_INPUTS
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import leaves_by_name
from tests.interop.conftest import content, read_tensors, write_tensors
from tests.interop.expert_cases import EXPERTS
from tests.interop.test_meshes import make_program
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.models.harness import build, random_tokens, relative_error
from tests.refusals import raises

ONE = MeshConfig(fsdp=1)
NEXTN = {"num_nextn_predict_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek": EXPERTS["deepseek_v3-0"] | NEXTN,
    "deepseek-two": EXPERTS["deepseek_v3-1"] | {"num_nextn_predict_layers": 2},
    "glm": EXPERTS["glm4_moe-0"] | NEXTN,
    "qwen3-next": EXPERTS["qwen3_next-0"] | NEXTN,
    "qwen3.5": EXPERTS["qwen3_5_text-0"] | {"mtp_num_hidden_layers": 1},
}
AROUND = {
    "deepseek": ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"),
    "qwen": ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"),
}
"""Names around the layer of a module, by vLLM's deepseek_mtp, glm4_moe_mtp and qwen3_next_mtp."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes random parameters; returns the folder."""

    @cache
    def export(name: str) -> Path:
        config = family(MODELS[name]["model_type"], "").read(ModelJson(MODELS[name]))
        program = make_program(config, ONE)
        values = build(config=config).values()
        params = jax.tree.map(lambda value, spec: jax.device_put(value, spec.sharding), values, program.params)
        return write(program, params, tmp_path_factory.mktemp("mtp") / name)

    return export


def write(program: Any, params: Any, out: Path) -> Path:
    options = {"tokenizer": None, "max_positions": 64}
    with program.on_mesh:
        export_model(str(out), Export(config=program.run.model, params=params, source={}, **options))
    return out


def load(folder: Path, mtp: bool = True) -> tuple[Any, Any]:
    config = open_published(f"hf:{folder}").config
    program = make_program(config if mtp else replace(config, mtp=None), ONE)
    with program.on_mesh:
        return program, load_published(f"hf:{folder}", program.run.model, program.params)[0]


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_that_were_read(exported: Any, tmp_path: Path, name: str) -> None:
    folder = exported(name)
    program, params = load(folder)
    assert content(write(program, params, tmp_path / "again")) == content(folder)
    tensors, join = read_tensors(folder), np.asarray(leaves_by_name(params["mtp"])["join.weight"])
    model = program.run.model
    if name.startswith("qwen"):
        last, prefixes, around = "model.layers.3.", ["mtp.layers.0."], {f"mtp.{each}.weight" for each in AROUND["qwen"]}
        assert np.array_equal(tensors["mtp.fc.weight"], join[0].T)
    else:
        last, prefixes = "model.layers.2.", [f"model.layers.{3 + depth}." for depth in range(model.mtp_depths)]
        around = {f"{prefix}{each}.weight" for prefix in prefixes for each in AROUND["deepseek"]}
        head = tensors["model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"]
        for depth, prefix in enumerate(prefixes):
            assert np.array_equal(tensors[f"{prefix}eh_proj.weight"], join[depth].T)
            assert np.array_equal(tensors[f"{prefix}embed_tokens.weight"], tensors["model.embed_tokens.weight"])
            assert np.array_equal(tensors[f"{prefix}shared_head.head.weight"], head)
    of_layer = {each.removeprefix(last) for each in tensors if each.startswith(last)}
    found = {each for each in tensors if each.startswith(("mtp.", *prefixes))}
    assert len(of_layer) > 8 and found == around | {f"{prefix}{each}" for prefix in prefixes for each in of_layer}


def test_the_tensors_of_a_folder_say_how_many_modules_it_has(exported: Any, tmp_path: Path) -> None:
    """transformers writes the key, but not the tensors; published files of Qwen3-Next have the tensors, but no key."""
    for name, module in (("deepseek-two", "model.layers.4."), ("glm", "model.layers.3."), ("qwen3-next", "mtp.")):
        folder, config = tmp_path / name, open_published(f"hf:{exported(name)}").config
        folder.mkdir()
        keys = json.loads((exported(name) / CONFIG).read_text())
        assert keys["num_nextn_predict_layers"] == config.mtp_depths
        (folder / CONFIG).write_text(
            json.dumps({key: keys[key] for key in keys if name != "qwen3-next" or "nextn" not in key})
        )
        tensors = read_tensors(exported(name))
        write_tensors(folder, tensors)
        assert open_published(f"hf:{folder}").config == config
        write_tensors(folder, {each: array for each, array in tensors.items() if not each.startswith(module)})
        fewer = open_published(f"hf:{folder}")
        assert fewer.config.mtp_depths == config.mtp_depths - 1
        fewer.check()


def test_a_run_without_modules_leaves_them_in_the_folder(exported: Any, tmp_path: Path) -> None:
    (program, params), (plain, without) = load(exported("deepseek")), load(exported("deepseek"), mtp=False)
    assert params.keys() - without.keys() == {"mtp"}
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, without, {name: params[name] for name in without})))
    folder = write(plain, without, tmp_path / "plain")
    assert json.loads((folder / CONFIG).read_text())["num_nextn_predict_layers"] == 0
    assert content(folder).keys() == {name for name in content(exported("deepseek")) if "layers.3." not in name}
    with program.on_mesh, raises(ConfigError, "model.mtp is multi_token_prediction, there it is none"):
        load_published(f"hf:{folder}", program.run.model, program.params)


def test_copies_may_be_missing_but_not_others(exported: Any, tmp_path: Path) -> None:
    tensors, copy = read_tensors(exported("glm")), "model.layers.3.embed_tokens.weight"
    shutil.copy(exported("glm") / CONFIG, tmp_path)
    write_tensors(tmp_path, {name: array for name, array in tensors.items() if name != copy})
    assert "mtp" in load(tmp_path)[1]
    write_tensors(tmp_path, tensors | {copy: tensors[copy] + 1})
    with raises(ConfigError, copy, "model.embed_tokens.weight", "model.mtp=none"):
        load(tmp_path)
    assert "mtp" not in load(tmp_path, mtp=False)[1]
    write_tensors(tmp_path, {name: array for name, array in tensors.items() if name != "model.layers.3.hnorm.weight"})
    with raises(ConfigError, "model.layers.3.hnorm.weight is missing"):
        load(tmp_path)


def test_a_family_says_what_modules_it_has() -> None:
    qwen, deepseek = (family(MODELS[name]["model_type"], "") for name in ("qwen3-next", "deepseek"))
    one = qwen.read(ModelJson(MODELS["qwen3-next"]))
    assert one.mtp is not None
    with raises(ConfigError, "mtp.depths=2"):
        family_of(replace(one, mtp=replace(one.mtp, depths=2)), "qwen3_next")
    model = deepseek.read(ModelJson(MODELS["deepseek"]))
    with raises(ConfigError, "model.mtp.layer.mlp"):
        family_of(replace(model, mtp=MultiTokenPrediction(layer=model.layer(0))), "deepseek_v3")


@needs_torch
@pytest.mark.slow(25)
def test_transformers_computes_the_same(exported: Any, tmp_path: Path) -> None:
    """It loads the exported folders, ignores the modules in its own logits, and has a class that computes them."""
    names, tokens = ("deepseek", "glm", "qwen3-next"), random_tokens(2, 24)
    for name in names:
        shutil.copytree(exported(name), tmp_path / name)
    np.save(tmp_path / "tokens.npy", tokens.astype(np.int64))
    script = Path(__file__).with_name("torch_mtp.py")
    made = subprocess.run([TORCH_PYTHON, script, tmp_path], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    for name in names:
        expected = np.load(tmp_path / f"{name}.npz")
        program, params = load(exported(name))
        later = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)[:, None]

        def logits(params: Any, program: Any = program, later: np.ndarray = later) -> tuple[jax.Array, jax.Array]:
            output, _ = program.model(params).forward({"inputs": jnp.asarray(tokens), MTP_INPUTS: jnp.asarray(later)})
            return output.materialize(), replace(output, hidden=output.mtp_hidden[0]).materialize()[:, :-1]

        with program.on_mesh, jax.default_matmul_precision("highest"):
            found = jax.jit(logits)(params)
        assert relative_error(found[0], expected["logits"]) < 1e-5
        assert relative_error(found[1], expected["later"]) < 1e-5
