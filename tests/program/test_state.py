"""The train state: where its arrays live, that its first values know no mesh, that a step takes its place."""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.optim.config import Optimizer
from jaxinfra.optim.optimizers import AdamW, Lion, Muon
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program, TrainState
from tests.parity.cases import BIASES, DOCUMENTS, Case, batch_on_host, on_host, put_like

CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)
ALONE = (MeshConfig(fsdp=8), MeshConfig(fsdp=1, tensor=8), MeshConfig(replica=8, fsdp=1))


def by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def shardings(state: TrainState) -> dict[str, Any]:
    return {path: (leaf.shape, leaf.dtype, leaf.sharding) for path, leaf in by_path(state).items()}


@pytest.mark.parametrize("optimizer", [AdamW(), Lion(), Muon()], ids=lambda o: type(o).__name__)
def test_optimizer_state_is_sharded_like_the_parameters(optimizer: Optimizer) -> None:
    run = replace(DOCUMENTS, optim=replace(DOCUMENTS.optim, optimizer=optimizer))
    program = Case(run=run, mesh=CUBE).program()
    params, moments = by_path(program.params), 0
    for path, leaf in by_path(program.state.opt_state).items():
        owner = next((name for name in params if path.endswith(name)), None)
        if owner is None:
            assert leaf.shape == (), path
            assert leaf.sharding.is_fully_replicated
        else:
            moments += 1
            assert (leaf.shape, leaf.sharding) == (params[owner].shape, params[owner].sharding), path
    assert moments >= len(params)
    assert {p.sharding for p in params.values()} == {p.sharding for p in by_path(program.state.ema).values()}


def test_no_device_has_more_than_its_shard() -> None:
    """Matrices are cut by fsdp and tensor; norms, and biases of the stream, are whole on every device."""
    program = Case(run=BIASES, mesh=CUBE).program()
    of_stream = ("['attention']['out']['bias']", "['mlp']['down']['bias']")
    for path, p in by_path(program.params).items():
        cut = math.prod(p.shape) // math.prod(p.sharding.shard_shape(p.shape))
        whole, in_two = "norm" in path or path.endswith(of_stream), "bias" in path or path == "['positions']"
        expected = 1 if whole else 2 if in_two else 4
        assert cut == expected, path


def first_values(mesh: MeshConfig) -> dict[str, np.ndarray]:
    """Rows of every shard hold eight numbers or more; XLA rounds shorter ones otherwise on CPUs, in the last bits."""
    run = replace(BIASES, model=replace(BIASES.model, hidden_size=64))
    program = Case(run=run, mesh=mesh).program()
    with program.on_mesh:
        return on_host(program.init(jax.random.key(7)))


def test_first_values_are_the_same_to_the_last_bit_on_every_mesh() -> None:
    wanted = first_values(MeshConfig(fsdp=1))
    for mesh in (*ALONE, CUBE, MeshConfig(replica=4, fsdp=2), MeshConfig(fsdp=2), MeshConfig(replica=2, fsdp=2)):
        found = first_values(mesh)
        assert {path for path, one in wanted.items() if not np.array_equal(one, found[path])} == set(), mesh


def test_a_step_gives_the_state_up_and_another_of_the_same_kind_back() -> None:
    """Shapes, dtypes and shardings of init, of the declared state and of a step are one: nothing compiles twice."""
    program = Case(run=DOCUMENTS, mesh=CUBE, accumulate=2).program()
    with program.on_mesh:
        before = program.init(jax.random.key(0))
        assert shardings(before) == shardings(program.state)
        after, _ = program.train_step(before, put_like(batch_on_host(DOCUMENTS), program.batch))
    assert shardings(after) == shardings(program.state)
    assert {path for path, leaf in by_path(before).items() if not leaf.is_deleted()} == set()


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1), CUBE], ids=["one", "cube"])
def test_the_new_state_takes_the_memory_of_the_old(mesh: MeshConfig) -> None:
    program = Program(replace(DOCUMENTS, mesh=mesh), make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes)]))
    leaves = jax.tree.leaves(program.state)
    state_bytes = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert program.lower().compile().memory_analysis().alias_size_in_bytes >= state_bytes
