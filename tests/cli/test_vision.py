"""A run on images from the command line: the same commands, and nothing of text."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from jaxinfra.config import load
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.digits import records
from jaxinfra.run import Run
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.train.trainer import Trainer
from tests.refusals import mend, names, raises, refused
from tests.tiny_run import Tiny, contents, ended, launch, start, summary

STEPS = 12
RECIPE = Path(__file__).parents[2] / "configs" / "data" / "digits.py"
OF_TEXT = re.compile(r"\b[Tt]oken")
CONFIG = """\
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.data.image_data import ImageData
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.run import Precision, Run
from jaxinfra.objectives.classification import Classification
from jaxinfra.track.config import TrackConfig
from jaxinfra.run import TrainConfig


def config() -> Run:
    return Run(
        name="seen",
        root={runs!r},
        model=VisionTransformerConfig(
            image_size=8, patch_size=4, channels=1, num_classes=10, num_layers=2,
            hidden_size=32, num_heads=4, mlp_dim=64, dropout=0.1,
        ),
        objective=Classification(),
        data=ImageData(store={store!r}, recipe="configs/data/digits.py", image_size=8, channels=1, max_pixel=16),
        precision=Precision(compute="float32"),
        train=TrainConfig(steps=12, global_batch=16, eval_every=6),
        checkpoint=CheckpointConfig(save_every=6),
        track=TrackConfig(log_every=1, console="plain"),
    )
"""


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the digits; tests only read it."""
    store = tmp_path_factory.mktemp("digits") / "store"
    assert launch("data", "prepare", str(RECIPE), f"store={store}", "--workers", "1").code == 0
    return store


@pytest.fixture
def seen(digits: Path, tmp_path: Path) -> Tiny:
    """A small run on images, with a place for what it writes."""
    config, runs = tmp_path / "seen.py", tmp_path / "runs"
    config.write_text(CONFIG.format(runs=str(runs), store=str(digits)))
    return Tiny(config=config, recipe=RECIPE, runs=runs)


def test_whole_run(seen: Tiny) -> None:
    """Its speed is in images, its score accuracy, in every place that shows them."""
    ended = seen.launch()
    assert (ended.code, ended.err) == (0, "")
    directory = seen.directory("seen")
    rows = read_metrics(directory / "metrics.jsonl")
    trained, evaluated = ([row for row in rows if name in row] for name in ("loss", "eval/loss"))
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert [row["step"] for row in evaluated] == [6, 12]
    assert trained[-1]["images_per_s"] * trained[-1]["step_time_s"] == pytest.approx(16)
    assert all(0 <= row["accuracy"] <= 1 for row in trained) and not any("tokens" in name for name in trained[-1])
    found = summary(directory)
    assert found["images"] == STEPS * 16
    assert found["validation"] == {name: evaluated[-1][f"eval/{name}"] for name in ("loss", "accuracy")}
    images = len(seen.loaded().data.open().validation())
    assert round(found["validation"]["accuracy"] * images, 6).is_integer(), "each validation image counts once"
    assert re.search(r"Validation accuracy +0\.\d{4}\s+nearest neighbor, accuracy +0\.9[89]\d\d", ended.out)
    assert "images/s" in ended.out and not OF_TEXT.search(ended.out)
    page = (directory / "report.html").read_text()
    shown = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "accuracy" in page and "images/s" in page and not OF_TEXT.search(shown)
    record = directory / "run.json"
    assert json.loads(record.read_text())["config"]["model"]["kind"] == "vision_transformer_config"
    assert launch(str(record), "name=again", "track.console=off").code == 0
    assert seen.losses("again") == seen.losses("seen")
    before = contents(seen.runs)
    refused(launch("sample", str(directory), "def"), "seen images language")
    assert contents(seen.runs) == before


def test_stop_and_go_on_with_another_mesh(seen: Tiny) -> None:
    """The same mesh gives the same losses bit for bit, another one the same to rounding."""
    assert seen.launch().code == 0
    whole = seen.losses("seen")
    for mesh in ((), ("mesh.fsdp=2", "mesh.tensor=4")):
        shutil.rmtree(seen.directory("seen") / "checkpoints" / str(STEPS))
        assert seen.launch(*mesh).code == 0
        if not mesh:
            assert seen.losses("seen") == whole
    whole, other = (list(map(float.fromhex, losses.values())) for losses in (whole, seen.losses("seen")))
    assert other[:6] == whole[:6] and other[6:] == pytest.approx(whole[6:], rel=1e-5)


def test_show_and_prepare(seen: Tiny) -> None:
    shown = seen.launch("mesh.fsdp=4", command="show")
    assert shown.code == 0
    assert re.search(r"images a step +16 ", shown.out) and "FLOPs an image" in shown.out
    assert "model = vision_transformer_config" in shown.out and "Learning rate over 12 steps" in shown.out
    store = launch("data", "show", str(seen.loaded().data.store))
    counts = [
        int(count.replace(",", "")) for count in re.findall(r"^(?:train|validation) +([\d,]+) images", store.out, re.M)
    ]
    assert len(counts) == 2 and sum(counts) == 1797
    assert re.search(r"train: images of a class\n +0 +\d+ █+\n", store.out), store.out
    peeked = seen.launch("--step", "3", "--rank", "1", "--of", "4", "mesh.fsdp=4", command="data peek")
    assert re.search(
        r"step 3, process 1 of 4, 4 of 16 rows\n.*\nrow 4: image \d+, 8x8x1, label (\d) \(\1\)\n", peeked.out
    )
    assert not seen.runs.exists()


WRONG = (
    ("model.patch_size=3", "model.image_size=8 model.patch_size=3"),
    ("model.num_heads=5", "model.hidden_size=32 model.num_heads=5"),
    ("model.image_size=16", "model.image_size=16"),
    ("model.channels=3", "model.channels=3"),
    ("model.num_layers=0", "model.num_layers=0"),
    ("model.dropout=1", "model.dropout=1.0"),
    ("data.image_size=12 model.image_size=12", "data.image_size=12"),
    ("data.channels=3 model.channels=3", "data.channels=3"),
    ("objective.label_smoothing=1", "objective.label_smoothing=1.0"),
    ("mesh.tensor=8", "model.num_heads=4 mesh.tensor=8"),
    ("mesh.stage=2 train.global_batch=4", "train.global_batch=4 mesh.stage=2"),
    ("mesh.context=2", "rules.sequence=(context,) mesh.context=2"),
    ("model.num_classes=9", "model.num_classes=9"),
)


@pytest.mark.parametrize(("overrides", "named"), WRONG)
def test_wrong_value(seen: Tiny, overrides: str, named: str) -> None:
    """The line suggests what works; nothing is written."""
    line = refused(seen.launch(*overrides.split()), named)
    assert not seen.runs.exists()
    mend(seen, overrides.split(), line, most=3)


def test_what_no_value_mends(seen: Tiny) -> None:
    refused(seen.launch("data.store=nowhere"), "data.store= /nowhere data prepare")
    refused(seen.launch("objective=causal_lm"), "objective=causal_lm data=image_data inputs targets images labels")
    assert not seen.runs.exists()


def test_a_prompt_needs_a_language_model(seen: Tiny) -> None:
    refused(seen.launch("track.sample_prompt=def"), "track.sample_prompt: language model")
    assert not seen.runs.exists()


def test_a_prompt_of_the_config_file_is_left_out_with_a_warning(seen: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """Such as that of the quickstart, if it trains another model."""
    config = seen.edited("track=TrackConfig(", 'track=TrackConfig(sample_prompt="def", ')
    assert Trainer(load(config, root=Run)).job.texts.prompt is None
    (line,) = (each.message for each in caplog.records if "sample_prompt" in each.message)
    names(line, "track.sample_prompt: language model")


def test_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with raises(ConfigError, "sklearn pip install 'jaxinfra[digits]'"):
        next(records())


@pytest.mark.slow(40)
@pytest.mark.usefixtures("all_optimizations")
def test_digits_are_learned(repo_root: Path, digits: Path, tmp_path: Path) -> None:
    """The shipped config, as a user starts it: 94 of 100 unseen digits after 400 steps, 97 after its 1,000."""
    config = str(repo_root / "configs" / "vit_digits.py")
    done = ended(
        start(config, f"root={tmp_path}", f"data.store={digits}", "name=short", "--devices", "cpu", "train.steps=400")
    )
    assert done.code == 0, done
    assert summary(tmp_path / "short")["validation"]["accuracy"] >= 0.94
