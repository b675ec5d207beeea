"""A version without a record: its text is nowhere, and everything else is where it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.config.classes import ClassFinder
from jaxinfra.data.labeled import LabeledData
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.pairs import PairData
from jaxinfra.data.store.layout import LENGTHS, OFFSETS
from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.store.versions import list_versions
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.prepare import forget as forgetting
from jaxinfra.prepare.builders.baseline import measure_baselines
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.formats import Completion, Labeled, Preference
from jaxinfra.prepare.forget import Found, delete_versions, find, forget, line_of, successor
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.workspace import open_workspace
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import raises
from tests.servers.fixtures import Server
from tests.stores import bytes_recipe, documents, jsonl

SECRET = "my name is Rosalind and my number is 271828"
ROWS = [{"id": f"user{i % 7}", "text": f"line {i}: " + "abc "[: i % 5] * (i % 23)} for i in range(80)]
ROWS[17]["text"] = ROWS[40]["text"] = SECRET  # in two places
ROWS[17]["id"] = "rosalind"


def found(store: TokenStore, key: str) -> Found:
    return find(store, key, ClassFinder())


def made(folder: Path, rows: list, **fields) -> tuple[ObjectStore, TokenStore]:
    prepare(bytes_recipe(jsonl(folder / "source", rows).root, folder / "store", **fields), workers=1)
    return ObjectStore(folder / "store"), TokenStore.open(folder / "store")


def without(root: ObjectStore, store: TokenStore, key: str) -> TokenStore:
    manifest = forget(root, store, found(store, key))
    return TokenStore.open(root.url, manifest.fingerprint)


def holds(folder: Path, text: bytes) -> list[str]:
    """The files that have a text, as bytes or as tokens of one byte each."""
    wanted = (text, np.frombuffer(text, np.uint8).astype("<u2").tobytes())
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if any(each in path.read_bytes() for each in wanted)]


@pytest.mark.parametrize("key", ["all.jsonl:18", "id=rosalind", "@"])
def test_its_text_is_gone_and_everything_else_is_where_it_was(tmp_path: Path, key: str) -> None:
    root, old = made(tmp_path, ROWS, packs=(PackSpec(seq_len=64),), baselines=True)
    (tmp_path / "its text").write_text(SECRET)
    before = found(old, key if key != "@" else f"@{tmp_path / 'its text'}")
    assert sum(map(len, before.documents.values())) == 2
    new = without(root, old, key if key != "@" else f"@{tmp_path / 'its text'}")
    assert holds(Path(old.storage.url), SECRET.encode()) and not holds(Path(new.storage.url), SECRET.encode())
    assert not [damage for _, damage in new.verify() if damage is not None]
    for split in ("train", "validation"):
        for name in (LENGTHS, OFFSETS):
            assert (old.read_all(split, name) == new.read_all(split, name)).all()
        kept = [text for text in documents(old, split) if text != SECRET]
        numbers = before.documents[split]
        assert [text for i, text in enumerate(documents(new, split)) if i not in numbers] == kept
        infos = [store.manifest.splits[split] for store in (old, new)]
        assert infos[0].bytes - infos[1].bytes == len(numbers) * len(SECRET) and infos[0].tokens == infos[1].tokens
    assert not holds(root.folder / new.manifest.fingerprint, b"rosalind")  # nor its key
    assert new.manifest.baselines == measure_baselines(new)[0] != old.manifest.baselines


def test_a_row_has_padding_in_its_place(tmp_path: Path) -> None:
    root, old = made(tmp_path, ROWS)
    numbers = found(old, "id=rosalind").documents["train"]
    new = without(root, old, "id=rosalind")
    offsets, is_its = old.read_all("train", OFFSETS), np.zeros(old.manifest.splits["train"].tokens, bool)
    for number in numbers:
        is_its[offsets[number] : offsets[number + 1]] = True
    sides = [
        TokenData(store=root.url, version=each.manifest.fingerprint, seq_len=32).open().train for each in (old, new)
    ]
    ids = np.arange(len(sides[0]))
    before, after = (side.read(ids, weighted=True) for side in sides)
    token = ids[:, None] * 32 + np.arange(32)
    has_part = is_its[token] | is_its[token + 1]  # as input or target
    assert has_part.any() and not after["weights"][has_part].any() and (has_part | (before["weights"] > 0)).any()
    eot = new.manifest.tokenizer_info.eot_id
    for name in ("inputs", "targets", "positions", "weights"):
        others = ~(is_its[token + 1] if name == "targets" else is_its[token])
        assert (before[name][others] == after[name][others]).all()
    assert (after["inputs"][is_its[token]] == eot).all() and (after["targets"][is_its[token + 1]] == eot).all()
    for row in ids:  # which tokens see one another
        own, others = after["segments"][row][is_its[token[row]]], ~is_its[token[row]]
        seen = [side["segments"][row][others] for side in (before, after)]
        assert (np.equal.outer(seen[0], seen[0]) == np.equal.outer(seen[1], seen[1])).all()
        assert len({*own}) == len(own) and not {*own} & {*seen[1]}


@pytest.mark.parametrize("by_length", [False, True])
def test_a_packed_row_leaves_out_its_segments(tmp_path: Path, by_length: bool) -> None:
    root, old = made(tmp_path, ROWS, packs=(PackSpec(seq_len=32, by_length=by_length),))
    new = without(root, old, "all.jsonl:18")
    packing = "best_fit_by_length" if by_length else "best_fit"
    sides = [
        TokenData(store=root.url, version=each.manifest.fingerprint, seq_len=32, packing=packing).open().train
        for each in (old, new)
    ]
    secret = np.frombuffer(SECRET.encode(), np.uint8)
    gone = 0
    assert len(sides[0]) == len(sides[1])
    for row in range(len(sides[0])):
        kept = []
        for side in sides:
            batch = {name: array[0] for name, array in side.read(np.array([row]), weighted=True).items()}
            assert ((batch["weights"] > 0) == (batch["segments"] > 0)).all()
            own = [batch["segments"] == number for number in range(1, 40)]
            kept.append({n: (*batch["targets"][each], *batch["positions"][each]) for n, each in enumerate(own)})
        left_out = {number for number in kept[0] if kept[0][number] != kept[1][number]}
        gone += len(left_out)
        assert all(not kept[1][number] for number in left_out)
        assert all(np.isin(kept[0][number][: len(kept[0][number]) // 2], [*secret, 256]).all() for number in left_out)
    assert gone == 2 * len(found(old, "all.jsonl:18").documents["train"])  # longer than a row: two segments each


CHAT = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
CHAT[5]["chosen"] = SECRET


def test_both_answers_of_a_pair_are_forgotten(tmp_path: Path) -> None:
    root, old = made(tmp_path, CHAT, format=Preference(template=None))
    documents = found(old, "all.jsonl:6").documents
    (split,) = (split for split, numbers in documents.items() if len(numbers))
    first = documents[split][0]
    assert documents[split].tolist() == [first, first + 1] and first % 2 == 0
    assert found(old, f"{split}:{first + 1}").documents[split].tolist() == [first, first + 1]
    new = without(root, old, "all.jsonl:6")
    assert not holds(Path(new.storage.url), SECRET.encode()) and not holds(Path(new.storage.url), b"question 5")
    sides = [PairData(store=root.url, version=each.manifest.fingerprint, seq_len=64).open() for each in (old, new)]
    before, after = (side._open_split(split, None).read(np.arange(first // 2 + 1), weighted=True) for side in sides)
    for name, array in after.items():
        assert (array[:-1] == before[name][:-1]).all()
    assert not after["chosen_weights"][-1].any() and not after["rejected_weights"][-1].any()


def test_a_labeled_completion_is_forgotten(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(30)]
    root, old = made(tmp_path, rows, format=Labeled(template=None))
    new = without(root, old, "train:4")
    data = LabeledData(store=root.url, version=new.manifest.fingerprint, seq_len=64).open()
    batch = data.train.read(np.arange(len(data.train)), weighted=True)
    assert not batch["completion_weights"][4].any() and batch["completion_weights"][5].any()


def test_a_mask_is_zero_there(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    root, old = made(tmp_path, rows, format=Completion(), packs=(PackSpec(seq_len=32),))
    new = without(root, old, "train:4")
    tokens, mask = new.read_with_mask("train", old.read_all("train", OFFSETS)[4:5], np.array([20]))
    assert (tokens[:19] == 256).all() and mask is not None and not mask[:19].any() and tokens[19] != 256


def test_the_same_recipe_takes_the_version_without_it_and_the_old_one_stays(tmp_path: Path) -> None:
    root, old = made(tmp_path, ROWS)
    recipe = bytes_recipe(tmp_path / "source", root.url)
    another = prepare(replace(recipe, dedup=Dedup()), workers=1).manifest.fingerprint
    new = without(root, old, "all.jsonl:18")
    first, second = old.manifest.fingerprint, new.manifest.fingerprint
    assert [each.fingerprint for each in list_versions(root)] == [first, second, another], "the newest one stays that"
    again = prepare(recipe, workers=1)
    assert (again.new, again.promoted, again.manifest.fingerprint) == (False, True, second)
    assert TokenStore.open(root.url).manifest.fingerprint == second
    (entry,) = forgetting.earlier(new)
    assert (entry["of"], entry["records"], entry["documents"], entry["tokens"]) == (first, 2, 2, 2 * len(SECRET) + 2)
    assert len(entry["hashes"]) == 1 and entry["when"] == new.manifest.created and line_of(new) == [first, second]
    assert (successor(root, old), successor(root, new)) == (second, "")
    with raises(ConfigError, f"{first} another process {second} again"):
        without(root, old, "train:3")
    assert {path.name for path in root.folder.iterdir() if path.is_dir()} - {".work"} == {first, second, another}
    third = without(root, new, "train:3")
    assert forgetting.earlier(third)[0] == entry and line_of(third) == [first, second, third.manifest.fingerprint]
    for key in ("all.jsonl:18", "train:3"):
        assert not found(third, key).documents, "it is padding already"
    delete_versions(root, [first, second])
    assert [each.fingerprint for each in list_versions(root)] == [another, third.manifest.fingerprint]
    assert {path.name for path in root.folder.iterdir()} >= {another} and not (root.folder / first).exists()
    assert not holds(root.folder / third.manifest.fingerprint, SECRET.encode())
    assert prepare(recipe, workers=1).manifest.fingerprint == third.manifest.fingerprint


def test_a_kill_leaves_the_store_as_it_was_and_the_same_call_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, old = made(tmp_path, ROWS)
    listed, (split,) = (
        list_versions(root),
        [split for split, each in found(old, "train:5").documents.items() if len(each)],
    )
    before = {path: path.read_bytes() for path in Path(old.storage.url).rglob("*") if path.is_file()}
    for name in ("_write_padding", "_new_manifest", "move_folder", "_change_index"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(forgetting, name, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
            forget(root, old, found(old, "train:5"))
        assert list_versions(root) == listed and TokenStore.open(root.url).manifest == old.manifest
        assert all(path.read_bytes() == content for path, content in before.items())
    new = without(root, old, f"{split}:5")
    assert TokenStore.open(root.url).manifest.fingerprint == new.manifest.fingerprint
    assert not [damage for store in (old, new) for _, damage in store.verify() if damage is not None]
    assert not (root.folder / ".work").exists()


def test_what_dedup_left_out_because_of_it_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    text = (
        "the quick brown fox jumps over the lazy dog and runs into the deep dark wood near the old mill at noon today"
    )
    rows = [{"text": f"other text number {i} with {i * i} words"} for i in range(30)]
    rows[4]["text"], rows[9]["text"], rows[20]["text"] = text, text, text.replace("today", "then")
    _, store = made(tmp_path, rows, dedup=Dedup(near=True))
    assert found(store, "all.jsonl:5").duplicates == ["all.jsonl:10", "all.jsonl:21"]
    assert found(store, "train:0").duplicates is None


def test_what_cannot_be_forgotten(tmp_path: Path) -> None:
    root, store = made(tmp_path, ROWS)
    documents = store.manifest.splits["train"].documents
    for key, named in {
        f"train:{documents}": f"train:{documents} train:{documents - 1}",
        "id=nobody": "id=nobody FIELD=VALUE train:NUMBER @FILE",
        f"@{tmp_path / 'none'}": str(tmp_path / "none"),
        f"@{tmp_path / 'source' / 'all.jsonl'}": "no document train:",
    }.items():
        with raises(ConfigError, named):
            found(store, key)
    with raises(ConfigError, "one version --version"):
        successor(ObjectStore(store.storage.url), store)
    with open_workspace(root, "of another", None), raises(ConfigError, f"store={root.url} wait"):
        forget(root, store, found(store, "train:5"))


def test_a_record_of_a_store_in_a_bucket(tmp_path: Path, s3: Server) -> None:
    url = s3.new_url()
    prepare(bytes_recipe(jsonl(tmp_path / "source", ROWS).root, url, work_dir=str(tmp_path / "work")), workers=1)
    root, old = ObjectStore(url), TokenStore.open(url)
    new = without(root, old, "id=rosalind")
    assert [each.fingerprint for each in list_versions(root)] == line_of(new)
    delete_versions(root, line_of(new)[:1])
    assert not any(name.startswith(old.manifest.fingerprint) for name in root.list_names())
    assert not [damage for _, damage in TokenStore.open(url).verify() if damage is not None]
