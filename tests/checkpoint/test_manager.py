"""A saved state is restored bit for bit, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.errors import CheckpointError, ConfigError
from tests.refusals import raises

from .states import OPTIMIZER, State, abstract, assert_same, make_mesh, make_state, snapshot


@pytest.mark.jax_range
def test_resumed_training_is_bit_equal(tmp_path):
    mesh = make_mesh(fsdp=4, tensor=2)

    @jax.jit
    def train_step(state: State) -> State:
        gradients = jax.tree.map(lambda leaf: leaf * jnp.asarray(0.1, leaf.dtype), state.params)
        updates, optimizer = OPTIMIZER.update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda leaf, update: leaf + update, state.params, updates)
        return State(step=state.step + 1, params=params, optimizer=optimizer)

    state = make_state(mesh)
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=2)) as checkpoints:
        for _ in range(6):
            state = train_step(state)
            checkpoints.save(int(state.step), state, {})
    with CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [4, 6]
        resumed = checkpoints.restore(4, abstract(state, mesh))
    for _ in range(2):
        resumed = train_step(resumed)
    assert_same(resumed, state)


def test_saves_only_due_steps(tmp_path):
    state = make_state(make_mesh())
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=3, keep_last=9)) as checkpoints:
        assert checkpoints.all_steps() == []
        saved = [step for step in range(1, 8) if checkpoints.save(step, state, {}, force=step == 7)]
        checkpoints.wait_until_finished()
        assert saved == checkpoints.all_steps() == [3, 6, 7]


def test_keeps_newest_steps_and_multiples_of_keep_every(tmp_path):
    state = make_state(make_mesh())
    config = CheckpointConfig(save_every=1, keep_last=2, keep_every=4)
    with CheckpointManager(tmp_path, config) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state, {})
        checkpoints.wait_until_finished()
        assert checkpoints.all_steps() == [4, 6, 7]
    with CheckpointManager(tmp_path, config) as checkpoints:
        checkpoints.save(9, state, {})
        checkpoints.wait_until_finished()
        assert checkpoints.all_steps() == [4, 7, 9]


def test_existing_step_is_not_written_again(tmp_path):
    mesh = make_mesh()
    first, second = make_state(mesh, seed=1), make_state(mesh, seed=2)
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        assert checkpoints.save(1, first, {"which": 1})
        assert not checkpoints.save(1, second, {"which": 2})
        assert not checkpoints.save(1, second, {"which": 2}, force=True)
        assert checkpoints.manifest(1).record == {"which": 1}
        assert_same(checkpoints.restore(1, abstract(first, mesh)), first)


def test_earlier_step_may_be_saved_after_a_later_one(tmp_path):
    state = make_state(make_mesh())
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1, keep_last=3)) as checkpoints:
        assert checkpoints.save(5, state, {})
        assert checkpoints.save(3, state, {})
        checkpoints.wait_until_finished()
        assert checkpoints.all_steps() == [3, 5]


@pytest.mark.jax_range
@pytest.mark.parametrize(
    ("saved_on", "restored_on"),
    [({"fsdp": 1}, {"fsdp": 8}), ({"fsdp": 4, "tensor": 2}, {"fsdp": 2}), ({"fsdp": 8}, {"fsdp": 2, "tensor": 4})],
)
def test_restores_on_another_mesh(tmp_path, saved_on, restored_on):
    state = make_state(make_mesh(**saved_on), ema=True)
    target = abstract(state, make_mesh(**restored_on))
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        restored = checkpoints.restore(1, target)
    assert_same(restored, state)
    for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert found.sharding == wanted.sharding


def test_restores_under_a_transfer_guard(tmp_path):
    mesh = make_mesh(fsdp=8)
    state = make_state(mesh)
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints, jax.transfer_guard("disallow"):
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        restored = checkpoints.restore(1, abstract(state, mesh))
    assert_same(restored, state)


def test_restores_params_or_ema_alone(tmp_path):
    state = make_state(make_mesh(fsdp=4, tensor=2), ema=True)
    target = abstract(state.params, make_mesh(fsdp=2))
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        checkpoints.save(1, state, {})
    with CheckpointManager(tmp_path, read_only=True) as checkpoints:
        assert_same(checkpoints.restore_params(1, target), state.params)
        assert_same(checkpoints.restore_params(1, target, subtree="ema"), state.ema)
        with raises(ConfigError, "average; step, params, optimizer, ema"):
            checkpoints.restore_params(1, target, subtree="average")
        with raises(ConfigError, "params.layers.in bfloat16[16,64]"):
            checkpoints.restore_params(1, {"embed": target["embed"], "layers": {"norm": target["layers"]["norm"]}})
        others = {name: value for name, value in target.items() if name != "layers"}
        assert checkpoints.restore_params(1, others, optional="layers").keys() == others.keys() > set()


def test_restoring_params_does_not_read_the_optimizer_state(tmp_path):
    size = 1 << 20
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (size,))}}
    state["optimizer"] = {f"m{i}": jax.random.normal(jax.random.key(i), (size,)) for i in range(1, 5)}
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        before = _bytes_read()
        checkpoints.restore_params(1, abstract(state["params"], make_mesh()))
        params_bytes = _bytes_read() - before
        checkpoints.restore(1, abstract(state, make_mesh()))
        all_bytes = _bytes_read() - before - params_bytes
    assert 0 < params_bytes < 0.3 * all_bytes


def _bytes_read() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_arrays_may_be_donated_right_after_save(tmp_path):
    mesh = make_mesh(fsdp=2)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    replicated = NamedSharding(mesh, PartitionSpec())
    config = CheckpointConfig(save_every=1, keep_last=4)
    unfinished = 0
    with CheckpointManager(tmp_path, config) as checkpoints:
        for step in range(1, 5):
            keys = jax.random.split(jax.random.key(step), 4)
            state = {
                f"w{i}": jax.device_put(jax.random.normal(key, (2048, 1024)), sharding) for i, key in enumerate(keys)
            }
            state["replicated"] = jax.device_put(state["w0"] + 1, replicated)
            expected = snapshot(state)
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = overwrite(state)
            jax.block_until_ready(state)
            unfinished += step not in checkpoints.all_steps()
            checkpoints.wait_until_finished()
            assert_same(checkpoints.restore(step, abstract(state, mesh)), expected)
            np.testing.assert_array_equal(state["w0"], -1.0)
    assert unfinished, "all saves finished before the arrays were overwritten: use larger arrays"


def test_synchronous_save_is_complete_when_it_returns(tmp_path):
    state = make_state(make_mesh())
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1, async_save=False)) as checkpoints:
        checkpoints.save(1, state, {})
        assert checkpoints.all_steps() == [1]


def test_record_is_that_of_the_time_of_the_save(tmp_path):
    record = {"config": {"train.steps": 60, "name": "Ω", "lr": 3e-4, "tags": ["a", None, True]}, "loss": 1 / 3}
    expected = {**record, "config": dict(record["config"])}
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        checkpoints.save(1, make_state(make_mesh()), record)
        record["config"]["train.steps"] = 61
        checkpoints.wait_until_finished()
        assert checkpoints.manifest(1).record == expected
        with pytest.raises(TypeError):
            checkpoints.save(2, make_state(make_mesh()), {"key": object()})
        assert checkpoints.all_steps() == [1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"embed": (32, 8)}, "params.embed float32[32,8] float32[32,16]"),
        ({"bias": (4,)}, "params.bias float32[4]"),
        ({"embed": None}, "params.embed float32[32,16]"),
    ],
)
def test_state_of_another_model_is_an_error(tmp_path, change, named):
    mesh = make_mesh()
    state = make_state(mesh)
    params = {**state.params, **{name: jnp.zeros(shape) for name, shape in change.items() if shape}}
    params = {name: leaf for name, leaf in params.items() if change.get(name, ()) is not None}
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        with raises(ConfigError, f"{tmp_path}/1", named):
            checkpoints.restore(1, abstract(state._replace(params=params), mesh))


def test_other_dtype_or_optimizer_is_an_error(tmp_path):
    mesh = make_mesh()
    state = make_state(mesh)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state.params)
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        with raises(ConfigError, "params.embed float16[32,16] float32"):
            checkpoints.restore(1, abstract(state._replace(params=halved), mesh))
        with raises(ConfigError, "optimizer.1.0.count int32[]"):
            checkpoints.restore(1, abstract(state._replace(optimizer=()), mesh))


def test_error_for_missing_step_lists_existing_steps(tmp_path):
    state = make_state(make_mesh())
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        with raises(CheckpointError, "1: none"):
            checkpoints.manifest(1)
        for step in (2, 4):
            checkpoints.save(step, state, {})
        checkpoints.wait_until_finished()
        for read in (checkpoints.restore, checkpoints.restore_params):
            with raises(CheckpointError, "3: 2, 4"):
                read(3, abstract(state, make_mesh()))


def test_read_only_manager_changes_nothing(tmp_path):
    state = make_state(make_mesh())
    directory = tmp_path / "run"
    with CheckpointManager(directory, read_only=True) as reader:
        assert reader.all_steps() == []
    assert not directory.exists()
    with CheckpointManager(directory, CheckpointConfig(save_every=1)) as writer:
        writer.save(1, state, {})
    incomplete = directory / "2.orbax-checkpoint-tmp"
    incomplete.mkdir()
    with CheckpointManager(directory, read_only=True) as reader:
        assert reader.all_steps() == [1]
        with pytest.raises(AssertionError, match="read_only"):
            reader.save(3, state, {})
    assert incomplete.exists()


def test_a_folder_may_have_any_name(tmp_path):
    state, directory = make_state(make_mesh(fsdp=2)), tmp_path / "jürgen 中"
    with CheckpointManager(directory, CheckpointConfig(save_every=1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        assert_same(checkpoints.restore(1, abstract(state, make_mesh(fsdp=2))), snapshot(state))
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
