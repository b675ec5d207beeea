"""Every example of docs/extend.md is trained, recorded and replayed, on emulated devices."""

import json
import re
import shlex
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.config import load
from jaxinfra.data.store.store import TokenStore
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.run import Run
from tests.models.test_decoding import check
from tests.refusals import refused
from tests.tiny_run import launch
from tests.tiny_run import tiny_data as tiny_data

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text()
EXAMPLES = dict(re.findall(r"^```python\n# (configs/\S+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = {
    path: shlex.split(found[1])
    for path in EXAMPLES
    if (found := re.search(rf"^    python -m launch ((?:data prepare )?{re.escape(path)}.*)$", PAGE, re.MULTILINE))
}
RECIPES = [path for path in EXAMPLES if path.startswith("configs/data/")]
RUNS = [path for path in EXAMPLES if path not in RECIPES]
FAST = [
    "train.steps=2",
    "train.global_batch=8",
    "train.eval_every=none",
    "track.log_every=1",
    "track.tensorboard=false",
    "track.sample_prompt=none",
]
TEXT = ["data.store=store", "data.seq_len=16"]
SMALL = ["hidden_size=32", "layers.mixer.num_heads=2", "layers.mlp.dim=32", "vocab_size=304"]


@pytest.fixture(scope="module")
def examples(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config files of the page, and a small store."""
    folder = tmp_path_factory.mktemp("examples")
    for path, content in EXAMPLES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    shutil.copy(ROOT / "configs" / "quickstart.py", folder / "configs")
    (folder / "store").symlink_to(tiny_data / "store")
    (folder / "docs").symlink_to(ROOT / "docs")
    return folder


@pytest.fixture(autouse=True)
def in_folder(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(examples)
    monkeypatch.syspath_prepend(str(examples))


def value_at(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = config[int(part)] if isinstance(config, list) else config[part]
    return config


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_every_example_has_a_command() -> None:
    assert len(RUNS) >= 8
    assert COMMANDS.keys() == EXAMPLES.keys()


@pytest.mark.parametrize("path", RUNS)
def test_examples_train_and_replay(path: str) -> None:
    content = EXAMPLES[path]
    _, *words = COMMANDS[path]
    words = [word for word in words if not word.startswith(("--", "cpu:", "mesh."))]
    mesh = ["mesh.fsdp=8"] if "FlaxModel" in content else ["mesh.fsdp=4", "mesh.tensor=2"]
    own_model = "ModelConfig" in content or "FlaxModel" in content
    small = [] if own_model else ["optim.schedule.warmup_steps=0", *(f"model.{size}" for size in SMALL)]
    shrunk = [*(TEXT if "quickstart" in content else []), *small, *FAST, *mesh]
    name = Path(path).stem
    ended = launch(path, *shrunk, *words, f"name={name}")
    assert ended.code == 0, ended
    assert ended.out.count("launch sample ") == ended.out.count(f'"PROMPT" --import {path}'), ended.out
    record = json.loads(Path(f"runs/{name}/run.json").read_text())

    classes = re.findall(r"^@dataclass.*\nclass (\w+)", content, re.MULTILINE)
    digest = sha256(Path(path).read_bytes()).hexdigest()[:16]
    assert classes
    for cls in classes:
        source = record["classes"][f"{name}.py:{cls}"]
        assert (Path(source["file"]), source["sha256"]) == (Path(path).absolute(), digest)
    for word in words:
        field, _, value = word.partition("=")
        assert value_at(record["config"], field) == (float(value) if value[0].isdigit() else value)

    replay = [f"runs/{name}/run.json", f"name={name}-again"]
    refused(launch(*replay), f"--import {Path(path).absolute()}")
    ended = launch(*replay, "--import", path)
    assert ended.code == 0, ended
    assert losses(Path(f"runs/{name}-again")) == losses(Path(f"runs/{name}"))
    Path(path).write_text(content + "\n")
    refused(launch(*replay[:1], "name=third", "--import", path), "changed", f"{name}.py:")
    Path(path).write_text(content)


def test_the_mixer_decodes_what_it_trains() -> None:
    model = load("configs/mean.py", ["model.layers.0.mixer.width=16"], root=Run).run.model
    assert isinstance(model, TransformerConfig)
    check({"mixer": model.layers[0].mixer}, MeshConfig(fsdp=2, tensor=2))


def test_a_mixer_without_a_method_or_with_a_mistake(examples: Path) -> None:
    content = EXAMPLES["configs/mean.py"]
    words = [*TEXT, *FAST, *(f"model.{size}" for size in SMALL), "optim.schedule.warmup_steps=0", "name=wrong"]
    for old, new, message in (
        ("def matmul_params", "def matmul_param", "wrong.py:CausalMean matmul_params Mixer"),
        ("cumsum(values", "cumsum(value", "wrong.py: NameError value"),
    ):
        (examples / "configs/wrong.py").write_text(content.replace(old, new))
        refused(launch("configs/wrong.py", *words), message)


@pytest.mark.parametrize("path", RECIPES)
def test_recipes_make_stores(path: str) -> None:
    ended = launch(*COMMANDS[path], "--workers", "2")
    assert ended.code == 0, ended
    assert TokenStore.open("stores/pages").manifest.splits["train"].documents > 10
