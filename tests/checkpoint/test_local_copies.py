"""Copies on a host: only a whole, intact one of the same run is restored, and a disk that is full ends nothing."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxinfra.checkpoint.local_copies import Copy, LocalCopies
from jaxinfra.checkpoint.manifest import read_manifest
from jaxinfra.checkpoint.shards import StateShards, neighbor_of
from jaxinfra.processes.peers import Peers
from tests.refusals import names

from .child import random_state, small_files
from .states import State, abstract, assert_same, make_mesh, make_state

MESH = make_mesh(fsdp=2, tensor=2)
IDENTITY = {"config": "a", "skip_batches": [[2, 3]]}


def open_copies[T](folder: Path, state: T, start: str = "one") -> LocalCopies[T]:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    return LocalCopies(folder / "own", start, StateShards(shapes, ["host"], 0), Peers(), lambda *parcels: iter(()))


def saved(folder: Path, *steps: int) -> list[State]:
    states = [make_state(MESH, seed=step) for step in steps]
    with open_copies(folder, states[0]) as copies:
        for step, state in zip(steps, states, strict=True):
            copies.save(step, state, {"guard": [step]}, IDENTITY)
    return states


def restored(
    folder: Path, *, newer_than: int = 0, mesh: Any = MESH, identity: Mapping[str, Any] = IDENTITY, start: str = "one"
) -> Copy[State] | None:
    with open_copies(folder, abstract(make_state(mesh), mesh), "two") as copies:
        return copies.restore(newer_than, identity, lambda name: name.endswith(f".{start}"))


def test_the_newest_copy_is_restored(tmp_path: Path) -> None:
    _, state = saved(tmp_path, 4, 6)
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["6.one"]
    copy = restored(tmp_path, newer_than=5)
    assert copy is not None and (copy.step, copy.record) == (6, {"guard": [6]})
    assert_same(copy.state, state)
    assert restored(tmp_path, newer_than=6) is None and not [*(tmp_path / "own").iterdir()]


def test_no_other_copy_is_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 4)
    kept = shutil.copytree(tmp_path / "own", tmp_path / "kept")

    def refuses(*named: str, **restore: Any) -> None:
        caplog.clear()
        assert restored(tmp_path, **restore) is None
        if named:
            (warning,) = caplog.messages
            names(warning, str(tmp_path), *named)
        else:
            assert not caplog.messages
        shutil.copytree(kept, tmp_path / "own", dirs_exist_ok=True)

    refuses(start="another")
    refuses("config", identity=IDENTITY | {"config": "b"})
    refuses("skip_batches", identity=IDENTITY | {"skip_batches": []})
    for path in sorted(kept.glob("*/*")):
        changed = tmp_path / "own" / path.relative_to(kept)
        content = bytearray(path.read_bytes())
        for damage in ("flipped", "cut", "missing"):
            changed.unlink()
            if damage == "flipped":
                content[len(content) // 2] ^= 1
                changed.write_bytes(content)
            elif damage == "cut":
                changed.write_bytes(path.read_bytes()[: len(content) // 2])
            is_partial = damage == "missing" and path.name == "manifest.json"  # as a kill leaves it
            refuses(*(() if is_partial else ("4", "not used")))
    assert restored(tmp_path) is not None


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 1}, {"tensor": 4}, {"fsdp": 2}])
def test_a_copy_is_restored_on_another_mesh(tmp_path: Path, axes: Mapping[str, int]) -> None:
    (state,) = saved(tmp_path, 4)
    copy = restored(tmp_path, mesh=make_mesh(**axes))
    assert copy is not None and (copy.step, copy.record) == (4, {"guard": [4]})
    assert_same(copy.state, state)


def test_on_another_mesh_a_copy_must_be_whole_and_of_this_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (state,) = saved(tmp_path, 4)
    kept, other = shutil.copytree(tmp_path / "own", tmp_path / "kept"), make_mesh(fsdp=4)
    for path in sorted(kept.glob("*/[0-9]*")):
        (tmp_path / "own" / path.relative_to(kept)).unlink()
        assert restored(tmp_path, mesh=other) is None
        names(caplog.messages[-1], "step 4 not used nowhere")
        shutil.copytree(kept, tmp_path / "own", dirs_exist_ok=True)
    (path,) = (tmp_path / "own").glob("*/manifest.json")
    manifest = read_manifest(path.parent, 4)
    record = {name: value for name, value in manifest.record.items() if name != "places"}  # as before
    path.write_bytes(replace(manifest, record=record).encode())
    kept = shutil.copytree(tmp_path / "own", tmp_path / "old")
    assert restored(tmp_path, mesh=other) is None
    names(caplog.messages[-1], "step 4 not used another layout")
    shutil.copytree(kept, tmp_path / "own", dirs_exist_ok=True)
    copy = restored(tmp_path)
    assert copy is not None
    assert_same(copy.state, state)


def test_a_full_disk_is_told_once_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = random_state(0, rows=1024)  # 4 MB
    with open_copies(tmp_path, state) as copies:
        copies.save(2, state, {}, IDENTITY)
        copies.wait_until_finished()
        with small_files():
            for step in (4, 6):
                copies.save(step, state, {}, IDENTITY)
                copies.wait_until_finished()
        (warning,) = caplog.messages
        names(warning, f"{tmp_path}: step 4: process 0 File too large")
        assert [path.name for path in (tmp_path / "own").iterdir()] == ["2.one"]
        copies.save(8, state, {}, IDENTITY)
        copies.wait_until_finished()
        assert [path.name for path in (tmp_path / "own").iterdir()] == ["8.one"]


@pytest.mark.parametrize(
    ("hosts", "neighbors"),
    [
        ("a", [0]),
        ("aa", [1, 0]),  # one host only, as in tests
        ("abc", [1, 2, 0]),
        ("aabb", [2, 3, 0, 1]),
        ("abab", [1, 0, 3, 2]),
        ("aaab", [3, 3, 3, 0]),
    ],
)
def test_the_neighbor_is_on_another_host(hosts: str, neighbors: list[int]) -> None:
    assert [neighbor_of(index, hosts) for index in range(len(hosts))] == neighbors
