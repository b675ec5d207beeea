"""Checkpoints in a bucket: as on a disk, and an owner that has lost its lease cannot complete one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.checkpoint import bucket_saver
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.errors import CheckpointError, ConfigError, RunInUseError, StorageError
from jaxinfra.storage import lease as lease_module
from jaxinfra.storage.lease import hold
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, raises
from tests.servers.fixtures import Server

from .states import abstract, assert_same, make_mesh, make_state, snapshot

EVERY = CheckpointConfig(save_every=1)


def saved(url: str, *steps: int, config: CheckpointConfig = EVERY, **mesh: int) -> dict[int, object]:
    states = {step: make_state(make_mesh(**mesh), seed=step, ema=True) for step in steps}
    with CheckpointManager(url, config) as checkpoints:
        for step, state in states.items():
            assert checkpoints.save(step, state, {"step": step})
    return {step: snapshot(state) for step, state in states.items()}


@pytest.mark.parametrize("restored_on", [{}, {"fsdp": 2}, {"fsdp": 2, "tensor": 4}])
def test_restores_on_another_mesh(server: Server, restored_on: dict[str, int]) -> None:
    url = server.new_url()
    expected = saved(url, 1, fsdp=4, tensor=2)
    wanted = abstract(make_state(make_mesh(), ema=True), make_mesh(**restored_on))
    with CheckpointManager(url, read_only=True) as checkpoints, jax.transfer_guard("disallow"):
        restored = checkpoints.restore(1, wanted)
        assert checkpoints.manifest(1).record == {"step": 1}
    assert_same(restored, expected[1])


def test_restores_params_or_ema_alone(server: Server) -> None:
    url, mesh = server.new_url(), make_mesh(fsdp=2)
    expected = saved(url, 1, fsdp=2)[1]
    with CheckpointManager(url, read_only=True) as checkpoints:
        params = abstract(make_state(mesh).params, mesh)
        assert_same(checkpoints.restore_params(1, params), expected.params)
        assert_same(checkpoints.restore_params(1, params, subtree="ema"), expected.ema)
        with raises(ConfigError, f"{url}/1 params.embed float32[99,2] float32[32,16]"):
            checkpoints.restore_params(1, {**params, "embed": jax.ShapeDtypeStruct((99, 2), jnp.float32)})


def test_keeps_the_newest_and_deletes_the_others(server: Server) -> None:
    url = server.new_url()
    saved(url, *range(1, 8), config=CheckpointConfig(save_every=1, keep_last=2, keep_every=3))
    with CheckpointManager(url, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [3, 6, 7]
    folders = {name.partition("/")[0].partition(".")[0] for name in ObjectStore(url).list_names()}
    assert folders == {"3", "6", "7", "index"}


def test_arrays_may_be_donated_right_after_save(server: Server) -> None:
    url, mesh = server.new_url(), make_mesh(fsdp=2)
    state = make_state(mesh)
    expected = snapshot(state)
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    with CheckpointManager(url, EVERY) as checkpoints:
        server.faults.delay_s = 0.05
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = update(state)
        checkpoints.wait_until_finished()
        server.faults.delay_s = 0.0
        assert_same(checkpoints.restore(1, abstract(state, mesh)), expected)


def test_an_unreliable_bucket_gets_every_byte(server: Server) -> None:
    """5 % of the requests fail, the others are slow."""
    url = server.new_url()
    server.faults.unavailable, server.faults.reset, server.faults.delay_s = 0.025, 0.025, 0.02
    expected = saved(url, 1, 2, 3, fsdp=4)
    assert server.faults.fired > 0
    with CheckpointManager(url, read_only=True) as checkpoints:
        for step in checkpoints.all_steps():
            assert_same(
                checkpoints.restore(step, abstract(make_state(make_mesh(), ema=True), make_mesh())), expected[step]
            )


def test_a_save_that_fails_is_told_once_and_the_next_one_succeeds(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.5")
    url, state = server.new_url(), make_state(make_mesh())
    with CheckpointManager(url, EVERY) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        server.faults.down = True
        checkpoints.save(2, state, {})
        with pytest.raises(StorageError) as error:
            checkpoints.wait_until_finished()
        names(str(error.value), f"{url}/2 saving failed 1;")
        server.faults.down = False
        assert checkpoints.all_steps() == [1]
        checkpoints.save(3, state, {})
        checkpoints.wait_until_finished()
        assert checkpoints.all_steps() == [1, 3]
    with CheckpointManager(url, EVERY):
        folders = {name.partition("/")[0].partition(".")[0] for name in ObjectStore(url).list_names()}
        assert folders == {"1", "3", "index"}, "the failed attempt is swept"


def test_damaged_bytes_are_noticed(server: Server) -> None:
    url = server.new_url()
    saved(url, 1)
    name = next(each for each in ObjectStore(url).list_names() if "params.embed/c/" in each)
    content = bytearray(server.get(f"{url}/{name}"))
    content[17] ^= 1
    server.put(f"{url}/{name}", bytes(content))
    state = make_state(make_mesh(), ema=True)
    with CheckpointManager(url, read_only=True) as checkpoints, raises(CheckpointError, f"{url}/1: cannot be read"):
        checkpoints.restore(1, abstract(state, make_mesh()))


def test_a_chunk_that_is_missing_is_noticed(server: Server) -> None:
    """Also one of zeros, of which each array of a new optimizer has some."""
    url = server.new_url()
    expected = saved(url, 1)
    store, state = ObjectStore(url), make_state(make_mesh(), ema=True)
    chunks = [name for name in store.list_names() if f"{name}/".count("/c/")]
    assert len(chunks) == len(jax.tree.leaves(expected[1])), "zeros are stored, too"
    with CheckpointManager(url, read_only=True) as checkpoints:
        for name in chunks:
            content = store.read(name)
            store.delete(name)
            with raises(CheckpointError, f"{url}/1: cannot be read {name} missing"):
                checkpoints.restore(1, abstract(state, make_mesh()))
            store.write(name, content)
        assert_same(checkpoints.restore(1, abstract(state, make_mesh())), expected[1])


def test_an_outage_is_no_damage(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that is away while its arrays are read says nothing about them: no older step, nothing set aside."""
    url, state = server.new_url(), make_state(make_mesh(), ema=True)
    expected = saved(url, 1, 2)

    def go_away(point: str, step: int) -> None:
        server.faults.down |= (point, step) == ("restore", 2)

    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.5")
    with CheckpointManager(url, EVERY) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(bucket_saver, "failpoint", go_away)
            with raises(StorageError, f"{url}/2. cannot be read start again when the server responds"):
                checkpoints.newest(lambda step: checkpoints.restore(step, abstract(state, make_mesh())))
        server.faults.clear()
        newest = checkpoints.newest(lambda step: checkpoints.restore(step, abstract(state, make_mesh())))
    assert newest is not None and newest[0] == 2
    assert_same(newest[1], expected[2])


def test_a_missing_index_deletes_nothing(server: Server) -> None:
    """As after a copy that was incomplete."""
    url = server.new_url()
    saved(url, 1, 2)
    store = ObjectStore(url)
    store.write("500.backup/a", b"of the user")
    index = store.read("index.json")
    store.delete("index.json")
    before = store.list_names()
    for read_only in (False, True):
        with raises(CheckpointError, f"{url}/index.json missing 1."):
            CheckpointManager(url, EVERY, read_only=read_only).all_steps()
    store.write("index.json", index[:-3])
    for read_only in (False, True):
        with raises(CheckpointError, f"{url}/index.json damaged"):
            CheckpointManager(url, EVERY, read_only=read_only).all_steps()
    assert store.list_names() == sorted([*before, "index.json"])
    store.write("index.json", index)
    with CheckpointManager(url, EVERY) as checkpoints:
        assert checkpoints.all_steps() == [1, 2]
    assert store.list_names() == sorted([*before, "index.json"]), "other folders are not touched"


def test_an_answer_that_is_lost_leaves_no_old_step(server: Server) -> None:
    url, lost = server.new_url(), []

    def lose(request: str) -> None:
        if "index.json" in request and request.startswith(("PUT", "POST")) and len(lost) < 2:
            lost.append(request)
            raise ConnectionError("the answer is lost")

    state = make_state(make_mesh())
    with CheckpointManager(url, CheckpointConfig(save_every=1, keep_last=1)) as checkpoints:
        for step in (1, 2, 3):
            server.faults.after = lose
            checkpoints.save(step, state, {})
            checkpoints.wait_until_finished()
        assert len(lost) == 2 and checkpoints.all_steps() == [3]
    assert {name.partition(".")[0] for name in ObjectStore(url).list_names()} == {"3", "index"}


def test_a_late_start_deletes_no_step_of_a_newer_owner(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped after it has claimed the index, and before it lists what earlier attempts have left."""
    monkeypatch.setattr(lease_module, "_process_identity", lambda pid: "")
    url, state, list_names = server.new_url(), make_state(make_mesh()), ObjectStore.list_names
    checkpoints = f"{url}/checkpoints"

    def list_late(self: ObjectStore, *arguments: str) -> list[str]:
        if self.url == checkpoints:
            monkeypatch.setattr(ObjectStore, "list_names", list_names)
            with (
                hold(url, beat_s=0.1, expiry_s=0.5) as new_lease,
                CheckpointManager(checkpoints, EVERY, lease=new_lease) as new,
            ):
                new.save(20, state, {})
        return list_names(self, *arguments)

    with hold(url) as lease, CheckpointManager(checkpoints, EVERY, lease=lease):
        ObjectStore(checkpoints).write("10.1.1/checkpoint.json", b"{}")  # as after a kill
    with hold(url, beat_s=1000) as lease:
        monkeypatch.setattr(ObjectStore, "list_names", list_late)
        CheckpointManager(checkpoints, EVERY, lease=lease)
    folders = {name.partition("/")[0] for name in ObjectStore(checkpoints).list_names()}
    assert folders == {"index.json", "20.3.1"}, "of earlier owners nothing is left"


def test_an_owner_that_lost_its_lease_completes_no_checkpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it tries: it was stopped after its last look at the lease."""
    monkeypatch.setattr(lease_module, "_process_identity", lambda pid: "")
    url, state = server.new_url(), make_state(make_mesh())
    with (
        hold(url, beat_s=1000) as old_lease,
        CheckpointManager(f"{url}/checkpoints", EVERY, lease=old_lease) as old,
    ):
        old.save(1, state, {})
        old.wait_until_finished()
        with (
            hold(url, beat_s=0.1, expiry_s=0.5) as new_lease,
            CheckpointManager(f"{url}/checkpoints", EVERY, lease=new_lease) as new,
        ):
            assert new.all_steps() == [1]
            old.save(2, state, {})
            with raises(RunInUseError, "another process taken over"):
                old.wait_until_finished()
            new.save(3, state, {})
            new.wait_until_finished()
            index = json.loads(ObjectStore(url).read("checkpoints/index.json"))
            assert (sorted(index["steps"]), index["token"]) == (["1", "3"], new_lease.token)


def test_an_owner_that_lost_its_lease_completes_no_checkpoint_on_a_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lease_module, "_process_identity", lambda pid: "")
    state = make_state(make_mesh())
    with (
        hold(tmp_path, beat_s=1000) as old_lease,
        CheckpointManager(tmp_path / "checkpoints", EVERY, lease=old_lease) as old,
        hold(tmp_path, beat_s=0.1, expiry_s=0.5) as new_lease,
        CheckpointManager(tmp_path / "checkpoints", EVERY, lease=new_lease) as new,
    ):
        old.save(1, state, {})
        with raises(RunInUseError, f"{tmp_path} taken over"):
            old.wait_until_finished()
        new.save(2, state, {})
        new.wait_until_finished()
        assert new.all_steps() == [2]


def test_no_such_step(server: Server) -> None:
    url = server.new_url()
    saved(url, 4)
    with CheckpointManager(url, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [4]
        with raises(CheckpointError, f"{url}/5: 4"):
            checkpoints.manifest(5)
    with CheckpointManager(server.new_url(), read_only=True) as checkpoints:
        assert checkpoints.all_steps() == []


def test_large_arrays_have_several_chunks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxinfra.checkpoint import bucket_saver, zarr_chunks

    monkeypatch.setattr(zarr_chunks, "MAX_CHUNK_BYTES", 300)
    monkeypatch.setattr(bucket_saver, "pending_bytes", lambda state: 1000)
    url = server.new_url()
    expected = saved(url, 1, fsdp=2)
    sizes = {name: len(server.get(f"{url}/{name}")) for name in ObjectStore(url).list_names() if "/c/" in name}
    assert max(sizes.values()) <= 304 and len(sizes) > 20
    with CheckpointManager(url, read_only=True) as checkpoints:
        restored = checkpoints.restore(1, abstract(make_state(make_mesh(), ema=True), make_mesh(fsdp=4)))
    assert_same(restored, expected[1])
    assert np.asarray(restored.params["embed"]).nbytes > 300
