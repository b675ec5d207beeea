"""Wrong input ends with one line that says what to do, and changes nothing that is there."""

import fcntl
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_run import Ended, Tiny, contents, launch, refused

from jaxinfra.checkpoint.checkpoints import Checkpoints
from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.run import resolved

DEVICES = 8


@pytest.fixture(scope="session")
def stopped(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped between its checkpoints: it has something to lose."""
    folder = tmp_path_factory.mktemp("stopped")
    config = folder / "tiny.py"
    made = tiny_data / "tiny.py"
    config.write_text(made.read_text().replace(str(tiny_data / "runs"), str(folder / "runs")))
    assert launch(str(config), "track.console=off").code == 0
    shutil.rmtree(folder / "runs" / "tiny" / "checkpoints" / "12")
    return folder / "runs"


@pytest.fixture
def begun(tiny: Tiny, stopped: Path) -> Tiny:
    """The tiny config beside a run of it that waits to go on."""
    shutil.copytree(stopped, tiny.runs)
    return tiny


def fix_of(line: str) -> list[str]:
    """The overrides that a message suggests."""
    found = re.search(r"; use ((?:[\w.]+=\S+ ?)+)", line)
    assert found, line
    return [each.rstrip(",") for each in found[1].split()]


# Overrides, the whole message as a pattern, and the exit code where it is not 81.
WRONG_VALUES = {
    "unknown key": ("train.stepz=4", r"train\.stepz: no such field; did you mean train\.steps\?"),
    "unknown part": ("modle.width=4", r"modle: no such field; did you mean model\?|modle\.width: .*model\.width\?"),
    "wrong type": ("train.steps=many", r"train\.steps=many: expected int"),
    "group, not a value": ("optim=3", r"optim=3: optim is not one value but a group of fields; set one of optim\..*"),
    "union": (
        "optim.optimizer=adamx",
        r"optim\.optimizer=adamx: expected adam_w, adafactor, .* or muon; did you mean adam_w\?",
    ),
    "literal": (
        "precision.compute=float16",
        r"precision\.compute=float16: expected float32 or bfloat16; did you mean bfloat16\?",
    ),
    "no equals": ("train.steps", r"train\.steps: not an override; write path=value, such as train\.steps=100"),
    "twice": ("train.steps=3 train.steps=4", r"train\.steps=3 and train\.steps=4: set twice; keep one of them"),
    "two rests": (
        "mesh.tensor=-1",
        r"mesh\.fsdp=-1, mesh\.tensor=-1: only one mesh axis may be -1; give fsdp a size",
    ),
    "axis of nothing": (
        "mesh.fsdp=0",
        r"mesh\.fsdp=0: an axis size must be at least 1, or -1 for the rest; use mesh\.fsdp=1",
    ),
    "devices left over": (
        "mesh.fsdp=2 mesh.tensor=2",
        r"mesh\.fsdp=2, mesh\.tensor=2: asks for 4 devices, 8 here; use --devices cpu:4 to emulate them, .*",
    ),
    "devices do not divide": (
        "mesh.tensor=3",
        r"mesh\.fsdp=-1, mesh\.tensor=3: asks for 3 devices, 8 here; the other axes must divide 8",
    ),
    "more stages than layers": (
        "mesh.stage=4",
        r"model\.layers=2, mesh\.stage=4, pipeline\.chunks=1: 4 places for layers; use model\.layers=4 or fewer stages",
    ),
    "rounds of microbatches": (
        "mesh.stage=2 model.layers=4 pipeline.schedule=interleaved pipeline.chunks=2 mesh.fsdp=1 mesh.replica=4",
        r"train\.accumulate=1, mesh\.stage=2, pipeline\.schedule=interleaved: interleaved microbatches come in rounds, "
        r"one a stage; use train\.accumulate=2",
    ),
    "chunks of another schedule": (
        "pipeline.chunks=2",
        r"pipeline\.schedule='1f1b', pipeline\.chunks=2: has one chunk a stage; use pipeline\.schedule=interleaved, .*",
    ),
    "interleaved without chunks": (
        "pipeline.schedule=interleaved",
        r"pipeline\.schedule=interleaved, pipeline\.chunks=1: needs at least 2 chunks a stage; use pipeline\.chunks=2",
    ),
    "shards of experts": (
        "model.experts=experts model.experts.count=6 mesh.fsdp=2 mesh.expert=4",
        r"model\.experts\.count=6, mesh\.expert=4: 4 shards do not divide 6 experts; use mesh\.expert=2 mesh\.fsdp=4",
    ),
    "dense layers without experts": (
        "model.dense_layers=1",
        r"model\.dense_layers=1, model\.experts=none: without experts all layers are dense; "
        r"use model\.dense_layers=0 model\.layers=3",
    ),
    "two uses of an axis": (
        "rules.batch=(fsdp,tensor)",
        r"rules\.batch=\(fsdp, tensor\), .*: tensor shards two dimensions of one activation; keep tensor in .*",
    ),
    "name with a slash": (
        "name=a/b",
        r"name=a/b: must be a folder's name, without a slash; use name=my-run",
    ),
    "name of the parent": ("name=..", r"name=\.\.: must be a folder's name, .*"),
    "remote root": ("root=gs://b/runs", r"root=gs://b/runs: must be a local folder; use root=runs"),
    "sharded sequence": (
        "mesh.fsdp=1 mesh.context=8 data.seq_len=72",
        r"data\.seq_len=72, mesh\.context=8: 8 shards have two blocks each, and 16 do not divide 72 positions; "
        r"use data\.seq_len=80",
    ),
    "context without a use": (
        "mesh.fsdp=1 mesh.context=8 rules.sequence=()",
        r"mesh\.context=8, rules\.sequence=\(\): the context axis spreads sequences and nothing else; "
        r"use rules\.sequence=\(context,\)",
    ),
    "chunks of a loss over shards": (
        "mesh.fsdp=1 mesh.context=8 task.loss_chunks=8",
        r"task\.loss_chunks=8: chunks must divide the 4 positions that a device has of a sequence; "
        r"use task\.loss_chunks=4",
    ),
    "sharded layers": (
        "rules.layers=fsdp",
        r"rules\.layers=\(fsdp,\): layers are scanned on every device, or shared out to pipeline stages; "
        r"use rules\.layers=stage or rules\.layers=\(\)",
    ),
    "no steps": ("train.steps=0", r"train\.steps=0: must be at least 1; use train\.steps=1 or more"),
    "negative rate": ("optim.peak_lr=-1", r"optim\.peak_lr=-1\.0: must be above 0 and finite; use optim\.peak_lr=3e-4"),
    "root through a file": (
        "root=/dev/null/x",
        r"/dev/null/x/tiny: cannot be written: Not a directory; .*",
        82,
    ),
    "store of another recipe": (
        "data.corpus.min_bytes=5",
        r"data\.store=\S+/store: was made from another recipe \(data\.corpus\.min_bytes=1 there, 5 here\); "
        r"choose another data\.store",
    ),
    "shorter than a window": (
        "data.seq_len=100000",
        r"data\.seq_len=100000: a window needs 100001 tokens, the train split of \S+ has \d+; "
        r"use data\.seq_len=\d+ or less, or a larger corpus",
    ),
    "held-out split shorter than a window": (
        "data.seq_len=2000",
        r"data\.seq_len=2000: a window needs 2001 tokens, the heldout split of \S+ has \d+; "
        r"use data\.seq_len=\d+ or less, or a larger corpus",
    ),
}


@pytest.mark.parametrize("case", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_value(begun: Tiny, case: tuple) -> None:
    overrides, pattern, *code = case
    before = contents(begun.runs)
    refused(begun.launch(*overrides.split()), pattern, *code)
    assert contents(begun.runs) == before


def test_quantised_products_need_qwix(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.run.find_spec", lambda name: None)
    refused(
        tiny.launch("precision.quantise=int8"),
        r"precision\.quantise=int8: .* qwix, which is not installed; run pip install qwix, or .* extra quantised",
    )


# Overrides that do not go together, and the message.
CROSS_FIELD = {
    "heads over tensor": (
        "model.heads=6 model.head_dim=4 mesh.tensor=4",
        r"model\.heads=6, mesh\.tensor=4: 4 shards do not divide 6 heads; use mesh\.tensor=2 mesh\.fsdp=4",
    ),
    "kv_heads over tensor": (
        "model.kv_heads=2 mesh.tensor=4",
        r"model\.kv_heads=2, mesh\.tensor=4: 4 shards do not divide 2 kv_heads; use mesh\.tensor=2 mesh\.fsdp=4",
    ),
    "kv_heads over heads": (
        "model.kv_heads=3",
        r"model\.heads=8, model\.kv_heads=3: kv_heads must divide heads; use model\.kv_heads=2",
    ),
    "norms by nothing": ("model.norm_eps=0.0", r"model\.norm_eps=0\.0: must be above 0; use model\.norm_eps=1e-5"),
    "scores without a cap": ("model.softcap=0.0", r"model\.softcap=0\.0: must be above 0; use model\.softcap=50\.0"),
    "no positions to learn": (
        "model.learned_positions=0",
        r"model\.learned_positions=0: must be at least 1; use model\.learned_positions=none",
    ),
    "biases of experts": (
        "model.experts=experts model.mlp_bias=true",
        r"model\.mlp_bias=true, .*: experts have no biases; use model\.mlp_bias=false",
    ),
    "a capacity that is no number": (
        "model.experts=experts model.experts.capacity_factor=nan",
        r"model\.experts\.capacity_factor=nan: must be above 0; use model\.experts\.capacity_factor=1\.25",
    ),
    "replicas of one batch": (
        "mesh.replica=2 mesh.fsdp=4 rules.batch=(fsdp,expert)",
        r"mesh\.replica=2, rules\.batch=\(fsdp, expert\): replicas would all do the same work; "
        r"use rules\.batch=\(replica,fsdp,expert\)",
    ),
    "latents beside heads of keys": (
        "model.latent=latent model.kv_heads=4",
        r"model\.kv_heads=4, model\.latent=latent: latent attention has none; use model\.kv_heads=none",
    ),
    "latents beside biases": (
        "model.latent=latent model.qkv_bias=true",
        r"model\.qkv_bias=true, model\.latent=latent: latent attention has none; use model\.qkv_bias=false",
    ),
    "latents without positions": (
        "model.latent=latent model.rope=none",
        r"model\.rope=none, model\.latent=latent: latent attention rotates keys; use model\.rope=rope",
    ),
    "latents of no width": (
        "model.latent=latent model.latent.kv_rank=0",
        r"model\.latent\.kv_rank=0: must be at least 1; use model\.latent\.kv_rank=64",
    ),
    "odd rotated keys": (
        "model.latent=latent model.latent.rope_dim=5",
        r"model\.rope\.fraction=1\.0, model\.latent\.rope_dim=5: the rotated part .*; use model\.latent\.rope_dim=6",
    ),
    "latents over fsdp": (
        "model.latent=latent model.latent.q_rank=12",
        r"model\.latent\.q_rank=12, mesh\.fsdp=8: 8 shards do not divide 12 q_rank; use mesh\.fsdp=4 mesh\.replica=2",
    ),
    "width over heads": (
        "model.heads=10",
        r"model\.width=32, model\.heads=10: heads must divide the width; use model\.width=40 or set head_dim",
    ),
    "vocabulary over tensor": (
        "model.vocab_size=306 mesh.tensor=4",
        r"model\.vocab_size=306, mesh\.tensor=4: 4 shards do not divide 306 vocab_size; use mesh\.tensor=2 .*",
    ),
    "mlp over tensor": (
        "model.mlp_dim=66 mesh.tensor=4",
        r"model\.mlp_dim=66, mesh\.tensor=4: 4 shards do not divide 66 mlp_dim; use mesh\.tensor=2 mesh\.fsdp=4",
    ),
    "odd mlp over tensor": (
        "model.mlp_dim=65 mesh.tensor=4 train.global_batch=2",
        r"model\.mlp_dim=65, .*; use mesh\.tensor=1 mesh\.fsdp=8 train\.global_batch=8",
    ),
    "sequence over tensor": (
        "data.seq_len=30 mesh.tensor=4",
        r"data\.seq_len=30, mesh\.tensor=4: 4 shards do not divide 30 seq_len; use mesh\.tensor=2 mesh\.fsdp=4",
    ),
    "width over fsdp": (
        "model.width=36 model.heads=6",
        r"model\.width=36, mesh\.fsdp=8: 8 shards do not divide 36 width; use mesh\.fsdp=4 mesh\.replica=2",
    ),
    "batch over devices": (
        "train.global_batch=12",
        r"train\.global_batch=12, mesh\.fsdp=8: the batch does not divide into 8 equal parts; "
        r"use train\.global_batch=16",
    ),
    "batch over microbatches": (
        "train.accumulate=3",
        r"train\.global_batch=8, train\.accumulate=3, mesh\.fsdp=8: .* 24 equal parts; use train\.global_batch=24",
    ),
    "loss chunks": (
        "task.loss_chunks=5",
        r"task\.loss_chunks=5, data\.seq_len=32: chunks must divide the sequence; use task\.loss_chunks=4",
    ),
    "learned positions": (
        "model.learned_positions=16",
        r"data\.seq_len=32, model\.learned_positions=16: sequences are longer than .*; use data\.seq_len=16",
    ),
    "warm-up beyond the end": (
        "optim.schedule.warmup_steps=40",
        r"optim\.schedule\.warmup_steps=40: step 40 has the peak rate, but the last step is 11; "
        r"use optim\.schedule\.warmup_steps=1, or more steps",
    ),
    "decay longer than the run": (
        "optim.schedule=wsd optim.schedule.decay_fraction=1.0",
        r"optim\.schedule\.warmup_steps=2, optim\.schedule\.decay_fraction=1\.0: .* do not fit into 12 steps; "
        r"use optim\.schedule\.warmup_steps=0 or less",
    ),
    "kept checkpoints that are never saved": (
        "checkpoint.keep_every=7",
        r"checkpoint\.keep_every=7, checkpoint\.every=5: .*; use checkpoint\.keep_every=10",
    ),
    "local layers": (
        "model.sights=(local,)",
        r"model\.sights=\(local,\), model\.window=none: local layers need a window; use model\.window=4096",
    ),
    "tokenizer larger than the model": (
        "model.vocab_size=256",
        r"model\.vocab_size=256: the store \S+/store has 300 tokens; use model\.vocab_size=300 or more",
    ),
}


@pytest.mark.parametrize("case", CROSS_FIELD.values(), ids=CROSS_FIELD)
def test_cross_field(begun: Tiny, case: tuple[str, str]) -> None:
    """The message names both fields, and what it suggests works."""
    overrides, pattern = case
    before = contents(begun.runs)
    line = refused(begun.launch(*overrides.split()), pattern)
    assert contents(begun.runs) == before
    check(begun, merged(overrides.split(), fix_of(line)))


def merged(overrides: Sequence[str], fix: Sequence[str]) -> list[str]:
    """The overrides, changed by those of a suggestion."""
    return [f"{path}={value}" for path, value in dict(each.split("=", 1) for each in (*overrides, *fix)).items()]


def check(tiny: Tiny, overrides: Sequence[str]) -> None:
    """Validates as a start on eight devices does."""
    run = tiny.loaded(*overrides)
    validate(run)
    validate(resolved(run, DEVICES))


def test_suggested_batch_trains(tiny: Tiny) -> None:
    line = refused(tiny.launch("train.global_batch=12", "train.steps=3"), r"train\.global_batch=12, .*")
    assert tiny.launch(*fix_of(line), "train.steps=3", "name=fixed").code == 0
    assert set(tiny.losses("fixed")) == {0, 1, 2}


def test_missing_store_names_the_command_that_makes_it(tiny: Tiny, tmp_path: Path) -> None:
    store = f"data.store={tmp_path / 'elsewhere'}"
    line = refused(tiny.launch(store), r"data\.store=\S+: no token store there; make it with: python -m launch .*")
    command = line.partition("python -m launch ")[2].split()
    assert launch(*command).code == 0
    assert tiny.launch(store, "train.steps=1", "optim.schedule.warmup_steps=0").code == 0


def test_damaged_store(begun: Tiny, tiny_data: Path, tmp_path: Path) -> None:
    """A file that is missing or cut short is named, before anything runs."""
    before = contents(begun.runs)
    for number, damage in enumerate((lambda path: path.unlink(), lambda path: os.truncate(path, 5))):
        store = tmp_path / f"store{number}"
        shutil.copytree(tiny_data / "store", store)
        largest = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        damage(largest)
        refused(begun.launch(f"data.store={store}"), rf"{re.escape(str(largest))}: .*; .*", 78)
    assert contents(begun.runs) == before


def test_config_file(tiny: Tiny, tmp_path: Path) -> None:
    def of(text: str) -> Ended:
        path = tmp_path / "wrong.py"
        path.write_text(text)
        return launch(str(path))

    refused(launch(str(tmp_path / "tinny.py")), r"\S+/tinny\.py: no such config file; did you mean \S+/tiny\.py\?")
    refused(launch(str(tmp_path)), r"\S+: is a directory; name a config file in it")
    refused(of("def config(:\n"), r"\S+/wrong\.py:1: SyntaxError: .*; mend the file")
    refused(of("def config():\n    return 1 / 0\n"), r"\S+/wrong\.py:2: ZeroDivisionError: division by zero")
    refused(of("import no_such_module\n"), r"\S+/wrong\.py:1: ModuleNotFoundError: No module named 'no_such_module'")
    refused(of("run = 1\n"), r"\S+/wrong\.py: no function config; define def config\(\) that returns the config")
    refused(of("def config():\n    return {}\n"), r"\S+: config\(\) must return a config dataclass, found dict")
    part = "from jaxinfra.train.loop import TrainConfig\n\n\ndef config():\n    return TrainConfig()\n"
    refused(of(part), r"\S+: expected a config of class Run, found TrainConfig")
    missing = tiny.edited('        name="tiny",\n', "", name="nameless.py")
    refused(launch(str(missing)), r"\S+/nameless\.py:\d+: TypeError: .*missing 1 required .* argument: 'name'")


def test_run_record(begun: Tiny, tmp_path: Path) -> None:
    """A broken record is never written over."""
    record = begun.directory() / "run.json"
    text = record.read_text()
    newer = text.replace('"format": 1', '"format": 99')
    cases = {
        text[:200]: r"\S+/run\.json:\d+: broken JSON, .*; restore the file",
        newer: r"\S+/run\.json: format=99 is newer than the 1 that this version reads; upgrade jaxinfra",
        "{}": r"\S+/run\.json: not a run record, it has no format; .*",
        text.replace(
            '"peak_lr"', '"peak_r"'
        ): r"\S+/run\.json: optim\.peak_r: no such field; did you mean .*\.peak_lr\?",
    }
    for broken, pattern in cases.items():
        record.write_text(broken)
        before = contents(begun.runs)
        refused(begun.launch(), pattern)
        refused(launch(str(record)), pattern)
        assert contents(begun.runs) == before


def test_directory_of_another_config(begun: Tiny) -> None:
    edited = begun.edited("peak_lr=3e-3", "peak_lr=4e-3, clip_norm=2.0")
    before = contents(begun.runs)
    line = refused(
        begun.launch(config=edited),
        r"\S+/runs/tiny: holds a run of another config: optim\.peak_lr is 0\.003 there and 0\.004 here and 1 more; "
        r"use name=ANOTHER, or change it back",
    )
    assert "name=ANOTHER" in line
    assert contents(begun.runs) == before
    check(begun, ["name=ANOTHER"])


def test_directory_of_other_data(begun: Tiny, tiny_data: Path, tmp_path: Path) -> None:
    """The recipe is the same, but the text behind it has changed."""
    text = tmp_path / "text"
    shutil.copytree(tiny_data / "text", text)
    root, store = f"data.corpus.root={text}", f"data.store={tmp_path / 'store'}"
    start = [root, store, "name=mine"]
    assert begun.launch(root, store, command="prepare").code == 0
    assert begun.launch(*start).code == 0
    shutil.rmtree(begun.directory("mine") / "checkpoints" / "12")
    shutil.rmtree(tmp_path / "store")
    next(iter(sorted(text.iterdir()))).write_text("w1 w2 w3\n" * 100)
    assert begun.launch(root, store, command="prepare").code == 0
    before = contents(begun.runs)
    refused(
        begun.launch(*start),
        r"\S+/mine: was begun on data with fingerprint \w+, \S+/store has \w+; use name=ANOTHER, or .*",
    )
    assert contents(begun.runs) == before


def test_corpus(tiny: Tiny, tmp_path: Path) -> None:
    def prepare(*overrides: str) -> Ended:
        return tiny.launch(f"data.store={tmp_path / 'new'}", *overrides, command="prepare")

    (tmp_path / "empty").mkdir()
    empty = f"data.corpus.root={tmp_path / 'empty'}"
    refused(prepare(empty), r"data\.corpus\.pattern=\*\.txt: no UTF-8 file of 1 bytes or more matches in \S+/empty .*")
    missing = f"data.corpus.root={tmp_path / 'nowhere'}"
    refused(prepare(missing), r"data\.corpus\.root=\S+: no such folder; give the folder that holds the text")
    through = f"data.corpus.root={tiny.config}"
    refused(prepare(through), r"data\.corpus\.root=\S+: is a file; give the folder and set data\.corpus\.pattern")
    refused(
        prepare("data.corpus.heldout_fraction=2"),
        r"data\.corpus\.heldout_fraction=2\.0: must be above 0 and below 1: both splits are needed; use \S+=0\.05",
    )
    refused(
        prepare("data.corpus.vocab_size=100"),
        r"data\.corpus\.vocab_size=100: .*; use data\.corpus\.vocab_size=257 or more",
    )
    occupied = f"data.store={tmp_path}"
    refused(
        tiny.launch(occupied, command="prepare"),
        r"data\.store=\S+: holds something that is no token store; choose an empty place",
    )
    assert not (tmp_path / "new").exists()


def test_unreadable_corpus(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    code = tiny.config.read_text()
    monkeypatch.setattr("jaxinfra.config.source._compiled", lambda path: compile(code, str(path), "exec"))
    new = f"data.store={tmp_path / 'new'}"
    refused(tiny.launch(new, command="prepare"), r"\S+\.txt: permission denied; make it readable or leave it out.*", 82)


def test_no_space(begun: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    full = replace_free(shutil.disk_usage("/"), 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    before = contents(begun.runs)
    refused(
        begun.launch(),
        r"\S+/runs/tiny: 1e-06 GB free, checkpoints need \S+ GB; free some space, .* smaller checkpoint\.keep_last",
        82,
    )
    assert contents(begun.runs) == before


def replace_free(usage, free: int):
    return usage._replace(free=free)


def test_unwritable_root(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", denied)
    refused(tiny.launch(), r"\S+/runs/tiny: cannot be written: Permission denied; mend it or .*", 82)
    assert not tiny.runs.exists()


def test_sample(tiny: Tiny, begun: Tiny, tmp_path: Path) -> None:
    refused(launch("sample", str(tmp_path), "w1"), r"\S+: no run\.json there; name the directory of a run, .*")
    shutil.rmtree(begun.directory() / "checkpoints")
    run_dir = str(begun.directory())
    refused(launch("sample", run_dir, "w1"), r"\S+/checkpoints: no checkpoint yet; train until the first .*", 79)
    (begun.directory() / "checkpoints").mkdir()
    refused(launch("sample", run_dir, "w1"), r"\S+/checkpoints: no checkpoint yet; train until the first .*", 79)
    for option, text in (("--temperature", "-1"), ("--top-k", "-1"), ("--top-p", "0"), ("--max-tokens", "0")):
        refused(launch("sample", run_dir, "w1", f"{option}={text}"), rf"{option} {text}\S*: must .*; use {option} .*")


@pytest.mark.parametrize("devices", ["nonsense", "cpu:0", "cpu:x", "gpu:2", ""])
def test_devices(tiny: Tiny, devices: str) -> None:
    refused(tiny.launch("--devices", devices), rf"--devices {devices}: expected cpu, cpu:N, gpu or tpu; use .* cpu:8")


def test_command_word() -> None:
    commands = "train, show, compile, prepare, sample, diff, parity, bench"
    unknown = rf"shwo: no such command and no such config; the commands are {commands}; did you mean show\?"
    refused(launch("shwo"), unknown)
    refused(launch("shwo", "config.py"), unknown)
    refused(launch("xyzzy"), rf"xyzzy: .* {commands}; a config is a file, such as configs/quickstart\.py")
    assert launch("show").code == 2
    assert launch().code == 2


def test_debug_shows_the_traceback(tiny: Tiny) -> None:
    for words in (["--debug", "train.stepz=1"], ["train.stepz=1", "--debug"]):
        ended = tiny.launch(*words)
        assert ended.code == ConfigError.exit_code
        assert ended.err.startswith("Traceback (most recent call last):\n")
        assert ended.err.endswith("error: train.stepz: no such field; did you mean train.steps?\n")


def test_lost_record(begun: Tiny) -> None:
    """Without run.json a checkpoint still tells what config it is of."""
    (begun.directory() / "run.json").unlink()
    edited = begun.edited("peak_lr=3e-3", "peak_lr=4e-3")
    refused(begun.launch(config=edited), r"\S+/runs/tiny: holds a run of another config: optim\.peak_lr is .*")


def test_two_starts_of_one_run(begun: Tiny) -> None:
    """The second is refused while the first goes on, and touches nothing."""
    holder = os.open(begun.directory(), os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    before = contents(begun.runs)
    refused(begun.launch(), r"\S+/runs/tiny: another process is training this run; wait for it, or use name=ANOTHER")
    assert contents(begun.runs) == before
    os.close(holder)


def test_diverged_run_keeps_its_last_good_checkpoint(tiny: Tiny) -> None:
    """A run that is no longer numbers ends with its own code and saves nothing of it."""
    overrides = ("optim.peak_lr=1e30", "checkpoint.every=1", "name=diverged")
    refused(tiny.launch(*overrides), r"step \d+: (loss|grad_norm) is (nan|inf); nothing was saved since: .*", 80)
    kept = sorted(int(p.name) for p in (tiny.directory("diverged") / "checkpoints").iterdir() if p.name.isdecimal())
    with Checkpoints(tiny.directory("diverged") / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == kept and kept and max(kept) < 12


def test_run_that_never_made_a_step_blocks_nothing(tiny: Tiny) -> None:
    """A config that was refused while it was compiled can be mended under the same name."""
    refused(tiny.launch("model.attention=cudnn"), r"model\.attention=cudnn: refused: it does not run on cpu; .*")
    assert tiny.launch("optim.clip_norm=2.0", "name=tiny").code == 0
