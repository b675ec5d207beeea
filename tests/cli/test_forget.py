"""`data forget`: what has read a record, the same bits without it, and what is refused."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.checkpoint.difference import compare_leaves, open_checkpoint
from jaxinfra.checkpoint.inventory import stored_checkpoints
from jaxinfra.cli.data import forget as command
from jaxinfra.cli.data.forget import _samples
from jaxinfra.config import Loaded, record, write_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.data.labeled import LabeledData
from jaxinfra.data.mixture import MixSource, Mixture
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.pairs import PairData
from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import StorageError
from jaxinfra.prepare.documents.formats import Labeled, Preference
from jaxinfra.prepare.forget import find, forget
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import ImageSet
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.tokenizers import TokenizerFile
from jaxinfra.storage.audit import verify
from jaxinfra.storage.lease import hold
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import refused
from tests.stores import bytes_recipe, jsonl
from tests.tiny_run import Tiny, contents, launch

KEY = "20.txt"  # a file whose document the tiny run reads at steps 9 and 11


@pytest.fixture
def store(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the store of the tiny run, to be changed."""
    return Path(shutil.copytree(tiny_data / "store", tmp_path / "own store"))


@pytest.mark.slow(20)
def test_a_replay_has_the_bits_of_a_run_that_never_read_it(tiny: Tiny, store: Path) -> None:
    words = ["track.console=off", "train.eval_every=none", "checkpoint.save_every=3", "checkpoint.keep_last=9"]
    assert tiny.launch(f"data.store={store}", *words).code == 0
    ended = launch("data", "forget", str(store), KEY, "--runs", str(tiny.runs))
    assert (ended.code, ended.err) == (0, "") and "from checkpoint 6: 6 steps, " in ended.out
    commands = [shlex.split(line.strip())[3:] for line in ended.out.partition("next:\n")[2].splitlines()]
    assert ["copy-to" in words for words in commands] == [True, False], ended.out
    for words in commands:
        assert launch(*words).code == 0
    words = (word for word in commands[1] if word.startswith("data."))
    assert launch(str(tiny.directory()), f"root={tiny.runs}", "name=fresh", *words).code == 0
    leaves = {}
    for other in ("tiny-forgot", "tiny"):
        sides = (stored_checkpoints(str(tiny.directory(name))) for name in ("fresh", other))
        leaves[other] = [*compare_leaves(*(open_checkpoint(side, 12) for side in sides))]
    assert all(each.is_equal for each in leaves["tiny-forgot"]) and len(leaves["tiny-forgot"]) > 10
    assert not all(each.is_equal for each in leaves["tiny"]), "it has learned from the record"
    assert stored_checkpoints(str(tiny.directory("tiny-forgot"))).steps() == [6, 9, 12]
    (change,) = json.loads((tiny.directory("tiny-forgot") / "run.json").read_text())["changes"]
    assert [*change["fields"]] == ["data"] and change["step"] == 6


def test_it_lists_the_steps_of_a_mixture(tiny: Tiny, store: Path, tmp_path: Path) -> None:
    rows = [{"text": f"line {i}: " + "w1 w2 " * (i % 23)} for i in range(40)]
    tokenizer = TokenizerFile(path=str(next(store.glob("*/tokenizer.json"))))
    other = bytes_recipe(jsonl(tmp_path / "source", rows).root, tmp_path / "other", tokenizer=tokenizer)
    versions = [prepare(other, workers=1).manifest.fingerprint, TokenStore.open(store).manifest.fingerprint]
    mixture = Mixture(sources=(MixSource(store=other.store), MixSource(store=str(store))), seq_len=32)
    loaded = Loaded(run=replace(tiny.loaded(), data=mixture), source="mixed.py", origins={})
    (tiny.runs / "mixed").mkdir(parents=True)
    written = record(loaded, command=[], versions={}, git={}, devices={}) | {"data_versions": versions}
    write_record(tiny.runs / "mixed" / "run.json", written)
    (tiny.runs / "mixed" / "metrics.jsonl").write_text('{"step": 12, "loss": 1.0}\n')
    ended = launch("data", "forget", str(store), KEY, "--runs", str(tiny.runs))
    listed = re.findall("of 12 steps have read it: (.+)\n", ended.out)[0].split(", ")
    new = TokenStore.open(store).manifest.fingerprint
    assert f"'data.sources.1.store={store}' data.sources.1.version={new}\n" in ended.out
    before, after = (mixture.with_versions([versions[0], each]).open() for each in (versions[1], new))
    differ = []
    for step in range(12):
        ids = before.sample_ids(step, 8)
        batches = [side.train.read(ids, weighted=True)["inputs"] for side in (before, after)]
        differ += [str(step + 1)] * bool((batches[0] != batches[1]).any())
    assert listed == differ and 0 < len(listed) < 12


def test_it_lists_what_has_read_a_record_and_what_came_of_it(begun: Tiny, store: Path) -> None:
    directory, before = begun.directory(), contents(store)
    record = json.loads((directory / "run.json").read_text())
    for name, origin, step in (("tuned", directory, 10), ("again", begun.runs / "tuned", 1), ("clean", directory, 5)):
        (begun.runs / name).mkdir()
        init = {"run": str(origin), "step": step, "fingerprint": record["fingerprint"]}
        changed = record | {"data_versions": ["of something else"], "init": init}
        (begun.runs / name / "run.json").write_text(json.dumps(changed))
    (begun.runs / "out").mkdir()
    receipt = {"source": {"source": str(begun.runs / "again"), "step": 3}, "files": {}}
    (begun.runs / "out" / "export.json").write_text(json.dumps(receipt))
    words = ("data", "forget", str(store), KEY, "--runs", str(begun.runs), "--audit", str(begun.runs / "audit"))
    ended = launch(*words, "--dry-run")
    assert (ended.code, ended.err) == (0, "") and contents(store) == before
    assert f"run          {directory}: " in ended.out and " 2 of 12 steps have read it: 9, 11\n" in ended.out
    assert re.search(r"from the start: 12 steps, \S+ hours\n  learned    checkpoints 10\n", ended.out)
    made = [line.split()[3].rstrip(",") for line in ended.out.splitlines() if line.startswith("  made of it ")]
    assert made == [str(begun.runs / name) for name in ("tuned", "again", "out")]
    assert "tokenizer " in ended.out and "nothing is written" in ended.out and "data.version=VERSION" in ended.out
    with hold(str(directory)):
        refused(launch(*words, "--delete-old"), f"--delete-old {directory}")
        assert contents(store) == before
    written = launch(*words)
    made = Path(re.findall("\nmade +(.+)", written.out)[0])
    assert written.code == 0 and written.out.replace(made.name, "VERSION").endswith(ended.out.partition("next:")[2])
    (entry,) = verify(str(begun.runs / "audit"))
    assert (entry.action, Path(entry.subject).name) == ("forgot", made.name) and KEY not in json.dumps(entry.details)
    refused(launch(*words), f"{KEY} {store} --delete-old")
    new = (f"data.store={store}", f"data.version={made.name}")
    refused(begun.launch(*new), f"{directory} name=ANOTHER --accept-change")
    deleted = launch(*words, "--delete-old")
    assert deleted.code == 0 and [path.name for path in store.iterdir() if path.is_dir()] == [made.name]
    refused(launch(*words), f"{KEY} {made} nothing")
    again = launch("data", "forget", str(store), "17.txt", "--runs", str(begun.runs), "--dry-run")
    assert " 4 of 12 steps have read it: 1, 5, 6, 9\n" in again.out, "also after its own version is gone"
    listed = launch("data", "forget", str(store), "train:1", "--dry-run", "--version", made.name[:8])
    assert listed.code == 0 and launch("data", "verify", str(store)).code == 0
    assert launch("data", "forget", str(begun.recipe), "validation:0", "--dry-run").out.startswith("record       valid")


def test_what_a_kill_has_left_is_deleted_and_recorded(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,), audit, before = [path for path in store.iterdir() if path.is_dir()], tmp_path / "audit", contents(store)
    words = ("data", "forget", str(store), KEY, "--delete-old", "--runs", str(tmp_path), "--audit")
    (tmp_path / "file").write_text("")
    refused(launch(*words, str(tmp_path / "file" / "audit")), "file/audit", code=StorageError.exit_code)
    assert contents(store) == before, "what cannot be recorded is not done"
    for owner, name in ((command.audit, "append"), (ObjectStore, "delete_below")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *words, **details: (_ for _ in ()).throw(KeyboardInterrupt))
            assert launch(*words, str(audit)).code == 130
    assert any(old.rglob("*")), "its data are there, without a manifest"
    ended = launch(*words, str(audit))
    assert ended.code == 0 and not old.exists(), ended
    (entry,) = verify(str(audit))
    (new,) = (path for path in store.iterdir() if path.is_dir())
    assert (entry.subject, entry.details["of"]) == (str(new), old.name)
    refused(launch(*words, str(audit)), f"{KEY} {new} nothing")


def test_what_is_refused(tiny: Tiny, store: Path, tmp_path: Path) -> None:
    before = contents(store)
    refused(launch("data", "forget", str(tmp_path / "none"), KEY), f"{tmp_path / 'none'} data prepare")
    refused(launch("data", "forget", str(store), "31.txt"), "31.txt train:NUMBER")
    refused(launch("data", "forget", str(store), "train:28"), "train:28 train:27")
    refused(launch("data", "forget", str(store), KEY, "--version", "no"), "version=no")
    (version,) = (path for path in store.iterdir() if path.is_dir())
    refused(launch("data", "forget", str(version), KEY), f"{version} --version")
    assert contents(store) == before
    pixels = jsonl(tmp_path / "pixels", [{"image": [[i, 0]], "label": 0} for i in range(20)])
    images = prepare(ImageSet(store=str(tmp_path / "images"), source=pixels, validation=ByKey(fraction=0.5)), workers=1)
    refused(launch("data", "forget", str(tmp_path / "images"), "train:0"), f"{images.path} images prepare")


PAIRS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
LABELS = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(40)]
TEXTS = [{"text": f"line {i}: " + "abc " * (i % 23)} for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "fields", "data"),
    [
        (TEXTS, {}, TokenData(store="", seq_len=32)),
        (TEXTS, {"packs": (PackSpec(seq_len=32),)}, TokenData(store="", seq_len=32, packing="best_fit")),
        (PAIRS, {"format": Preference(template=None)}, PairData(store="", seq_len=32)),
        (LABELS, {"format": Labeled(template=None)}, LabeledData(store="", seq_len=32)),
    ],
    ids=["concat", "packed", "pairs", "labeled"],
)
def test_the_samples_of_a_record_are_those_that_differ_without_it(rows, fields, data, tmp_path: Path) -> None:
    prepare(bytes_recipe(jsonl(tmp_path / "source", rows).root, tmp_path / "store", **fields), workers=1)
    root, old = ObjectStore(tmp_path / "store"), TokenStore.open(tmp_path / "store")
    found = find(old, "train:9", ClassFinder())
    named = {*_samples(data, old, found.documents["train"]).tolist()}
    versions = old.manifest.fingerprint, forget(root, old, found).fingerprint
    sides = [type(data)(**vars(data) | {"store": root.url, "version": each}).open().train for each in versions]
    batches = [side.read(np.arange(len(side)), weighted=True) for side in sides]
    differ = {sample for name in batches[0] for sample in np.nonzero(batches[0][name] != batches[1][name])[0].tolist()}
    assert differ <= named and len(named - differ) <= 1  # one may have no more of it than its end
