"""Checkpoints in a bucket: as on a disk, and an owner that has lost its lease cannot complete one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.errors import CheckpointError, ConfigError, StorageError
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
        assert checkpoints.load_record(1) == {"step": 1}
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
            with pytest.raises(ConfigError) as error:
                old.wait_until_finished()
            names(str(error.value), "another process taken over")
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
        with pytest.raises(ConfigError) as error:
            old.wait_until_finished()
        names(str(error.value), f"{tmp_path} taken over")
        new.save(2, state, {})
        new.wait_until_finished()
        assert new.all_steps() == [2]


def test_no_such_step(server: Server) -> None:
    url = server.new_url()
    saved(url, 4)
    with CheckpointManager(url, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 4
        with raises(CheckpointError, f"{url}/5: 4"):
            checkpoints.load_record(5)
    with CheckpointManager(server.new_url(), read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None


def test_large_arrays_have_several_chunks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxinfra.checkpoint import bucket_backend

    monkeypatch.setattr(bucket_backend, "_MAX_CHUNK_BYTES", 300)
    monkeypatch.setattr(bucket_backend, "_MAX_PENDING_BYTES", 1000)
    url = server.new_url()
    expected = saved(url, 1, fsdp=2)
    sizes = {name: len(server.get(f"{url}/{name}")) for name in ObjectStore(url).list_names() if "/c/" in name}
    assert max(sizes.values()) <= 304 and len(sizes) > 20
    with CheckpointManager(url, read_only=True) as checkpoints:
        restored = checkpoints.restore(1, abstract(make_state(make_mesh(), ema=True), make_mesh(fsdp=4)))
    assert_same(restored, expected[1])
    assert np.asarray(restored.params["embed"]).nbytes > 300
