"""No damage of a checkpoint is restored without a word; an older one takes its place."""

import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxinfra.checkpoint import manifest as manifest_module
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.errors import CheckpointError, StorageError
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, raises
from tests.servers.fixtures import Server

from .states import abstract, assert_same, make_mesh, make_state, snapshot

KEEP_ALL = CheckpointConfig(save_every=1, keep_last=99)


def save(directory: Path | str, *steps: int, config: CheckpointConfig = KEEP_ALL) -> dict[int, Any]:
    states = {step: make_state(make_mesh(fsdp=2), seed=step) for step in steps}
    with CheckpointManager(directory, config) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"step": step})
    return {step: snapshot(state) for step, state in states.items()}


def wanted() -> Any:
    return abstract(make_state(make_mesh()), make_mesh(fsdp=4))


def restore_newest(checkpoints: CheckpointManager) -> tuple[int, Any]:
    newest = checkpoints.newest(lambda step: checkpoints.restore(step, wanted()))
    assert newest is not None
    return newest


def damages(store: ObjectStore, folder: str, other: str, chance: random.Random) -> str:
    """Damages one object of a step in one of many ways; returns what it did."""
    found = [name for name in store.list_names(f"{folder}/") if store.read(name)]
    name = chance.choice(found)
    content = bytearray(store.read(name))
    kind = chance.choice(["flip", "flip", "flip", "truncate", "zero", "delete", "swap", "stale", "append"])
    if kind == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        del content[chance.randrange(len(content)) :]
    elif kind == "zero":
        content[:] = bytes(len(content))
    elif kind == "append":
        content += b"\0"
    elif kind == "swap":
        partner = chance.choice([each for each in found if store.read(each) != bytes(content)])
        store.write(name, store.read(partner))
        content, name = content, partner
    elif kind == "stale":
        older = name.replace(folder, other, 1)
        same = [each for each in store.list_names(f"{other}/") if each == older or each.endswith(Path(name).suffix)]
        content = bytearray(store.read(chance.choice(same)))
    if kind == "delete":
        store.delete(name)
    else:
        store.write(name, bytes(content))
    return f"{kind} {name}"


def assert_all_found(where: str, folders: dict[int, str], rounds: int, expected: Any) -> None:
    """Damages step 2 many times."""
    store, chance = ObjectStore(where), random.Random(7)
    intact = {name: store.read(name) for name in store.list_names(f"{folders[2]}/")}
    silent = []
    for _ in range(rounds):
        did = damages(store, folders[2], folders[1], chance)
        changed = [name for name, content in intact.items() if store.read_or_none(name) != content]
        with CheckpointManager(where, read_only=True) as checkpoints:
            try:
                checkpoints.restore(2, wanted())
            except CheckpointError:
                pass
            else:
                silent.append(did) if changed else None
        for name in changed:
            store.write(name, intact[name])
    assert not silent, silent
    with CheckpointManager(where, read_only=True) as checkpoints:
        assert_same(checkpoints.restore(2, wanted()), expected)


@pytest.mark.slow(10)
def test_no_damage_on_a_disk_is_silent(tmp_path: Path) -> None:
    expected = save(tmp_path, 1, 2)
    assert_all_found(str(tmp_path), {1: "1", 2: "2"}, 400, expected[2])


@pytest.mark.slow(10)
def test_no_damage_in_a_bucket_is_silent(server: Server) -> None:
    url = server.new_url()
    expected = save(url, 1, 2)
    steps = json.loads(ObjectStore(url).read("index.json"))["steps"]
    assert_all_found(url, {step: steps[str(step)]["folder"] for step in (1, 2)}, 40, expected[2])


@pytest.mark.parametrize("part", ["params", "optimizer", "manifest.json"])
def test_an_older_step_takes_the_place_of_a_damaged_one(tmp_path: Path, part: str, caplog: Any) -> None:
    expected = save(tmp_path, 1, 2, 3)
    (tmp_path / "70").mkdir()
    files = [path for path in (tmp_path / "3").rglob("*") if part in str(path) and path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with CheckpointManager(tmp_path, read_only=True) as reader, caplog.at_level(logging.WARNING):
        step, restored = restore_newest(reader)
    assert step == 2 and {"3", "70"} <= {*os.listdir(tmp_path)}, "a reader moves nothing"
    assert_same(restored, expected[2])
    caplog.clear()
    with CheckpointManager(tmp_path, KEEP_ALL) as checkpoints, caplog.at_level(logging.WARNING):
        step, restored = restore_newest(checkpoints)
        assert step == 2 and checkpoints.all_steps() == [1, 2]
        first, second = caplog.messages
        names(first, f"{tmp_path}/70: damaged: manifest.json is missing, {tmp_path}/70.damaged step 2")
        names(second, f"{tmp_path}/3: damaged: {path.relative_to(tmp_path / '3')}  {tmp_path}/3.damaged step 2")
        checkpoints.save(3, make_state(make_mesh(), seed=3), {})
    assert (tmp_path / "3.damaged").is_dir()
    with CheckpointManager(tmp_path, read_only=True) as reader:
        assert_same(reader.restore(3, wanted()), expected[3])


def test_damaged_steps_alone_are_an_error_and_stay(tmp_path: Path) -> None:
    """Else a run would begin anew the next time."""
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "1" / "params")
    os.truncate(tmp_path / "2" / "manifest.json", 100)
    for _ in range(2):
        expected = raises(CheckpointError, f"{tmp_path}: 2: manifest.json damaged; 1: params/ missing; name=ANOTHER")
        with CheckpointManager(tmp_path, KEEP_ALL) as checkpoints, expected:
            checkpoints.newest(checkpoints.manifest)


def test_a_step_moved_into_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "9")
    expected = raises(CheckpointError, f"{tmp_path}/9: of step 2; 1")
    with CheckpointManager(tmp_path, read_only=True) as checkpoints, expected:
        checkpoints.restore(9, wanted())


def test_a_damaged_step_in_a_bucket_leaves_the_index(server: Server, caplog: Any) -> None:
    url = server.new_url()
    expected, store = save(url, 1, 2), ObjectStore(url)
    folder = json.loads(store.read("index.json"))["steps"]["2"]["folder"]
    chunks = [name for name in store.list_names(f"{folder}/params") if "/c" in name]
    left, right = [name for name in chunks if "layers.in" in name][:2]
    content = store.read(left), store.read(right)
    store.write(left, content[1])
    store.write(right, content[0])
    for _ in range(2):
        with CheckpointManager(url, KEEP_ALL) as checkpoints:
            step, restored = restore_newest(checkpoints)
            assert (step, checkpoints.all_steps()) == (1, [1])
        assert_same(restored, expected[1])
        assert chunks[0] in store.list_names(), "it is kept, to look at"
    assert len(caplog.messages) == 1 and f"{folder}" in caplog.messages[0]


def test_a_bucket_that_stores_other_bytes_gets_no_step(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.new_url()
    save(url, 1)

    start_write, state = ObjectStore.start_write, make_state(make_mesh(), seed=2)

    def lie(self: ObjectStore, name: str, content: bytes) -> Any:
        is_last = name.endswith("embed/c/0/0")
        return start_write(self, name, content[:-1] + bytes([content[-1] ^ 1]) if is_last else content)

    with CheckpointManager(url, KEEP_ALL) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "start_write", lie)
            checkpoints.save(2, state, {})
            with raises(StorageError, f"{url}/2: embed does not hold what was just written"):
                checkpoints.wait_until_finished()
        assert checkpoints.all_steps() == [1]
        checkpoints.save(3, state, {})
    with CheckpointManager(url, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [1, 3]


def test_large_files_are_hashed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 100)
    save(tmp_path, 1)
    name, expected = max(
        json.loads((tmp_path / "1" / "manifest.json").read_text())["files"].items(), key=lambda each: each[1][0]
    )
    assert len(expected[1]) == -(-expected[0] // 100) > 3
    content = bytearray((tmp_path / "1" / name).read_bytes())
    content[250] ^= 1
    (tmp_path / "1" / name).write_bytes(content)
    refusal = raises(CheckpointError, f"{name} is damaged in bytes 200")
    with CheckpointManager(tmp_path, read_only=True) as checkpoints, refusal:
        checkpoints.restore(1, wanted())


def test_keeps_the_best_and_counts_no_damaged_ones(tmp_path: Path) -> None:
    config = CheckpointConfig(save_every=1, keep_last=2, keep_best=2)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: 2.5, 6: None}
    state = make_state(make_mesh())
    with CheckpointManager(tmp_path, config) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state, {}, metrics=None if loss is None else {"loss": loss})
        checkpoints.wait_until_finished()
        assert checkpoints.all_steps() == [2, 3, 5, 6]
    (tmp_path / "6" / "manifest.json").unlink()
    with CheckpointManager(tmp_path, config) as checkpoints:
        checkpoints.save(7, state, {})
        checkpoints.wait_until_finished()
        assert checkpoints.all_steps() == [2, 3, 5, 6, 7], "5 and 7 are the last two intact ones"


def test_orbax_alone_reads_a_part(tmp_path: Path) -> None:
    def as_numpy(_: Any) -> Any:
        return ocp.RestoreArgs(restore_type=np.ndarray)

    expected = save(tmp_path, 1)[1]
    with ocp.PyTreeCheckpointer() as reader:
        restored = reader.restore(tmp_path / "1" / "params", restore_args=jax.tree.map(as_numpy, expected.params))
    assert_same(jax.tree.map(np.asarray, restored), expected.params)
