"""Optimizer state in few bits: the numbers of bitsandbytes, rounding at random, and the same state on every mesh."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.optim.config import OptimConfig, Optimizer, StateDtype
from jaxinfra.optim.optimizers import SGD, AdamW, Lion, Muon, make_optimizer
from jaxinfra.optim.schedules import Constant
from jaxinfra.optim.state_dtype import Blocks8, decode, encode, from_blocks, round_at_random, to_blocks
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.optim.conftest import spec

OPTIM = OptimConfig(schedule=Constant(), peak_lr=0.01)
SPECS = {
    "blocks": {
        "up": spec("matrix", (3, 64, 512), "layers", "embed", "mlp", in_dims=(1,), out_dims=(2,)),
        "q": spec("matrix", (3, 64, 4, 64), "layers", "embed", "heads", "head_dim", in_dims=(1,), out_dims=(2, 3)),
        "scale": spec("norm", (3, 64), "layers", "embed"),
    },
    "head": spec("head", (64, 67), "embed", "vocab", in_dims=(0,), out_dims=(1,)),
}
SHARDINGS = {
    "blocks": {"up": P(None, "fsdp", "tensor"), "q": P(None, "fsdp", "tensor", None), "scale": P(None, "fsdp")},
    "head": P("fsdp", None),
}
TRANSPOSED = {
    "blocks": {"up": P(None, None, ("fsdp", "tensor")), "q": P(None, "tensor", None, "fsdp"), "scale": P()},
    "head": P(),
}


def drawn(seed: int) -> Any:
    """Normal numbers whose sizes differ from row to row, up to a factor of a million."""
    rng = np.random.default_rng(seed)

    def draw(each: Any) -> np.ndarray:
        sizes = 10 ** rng.uniform(-6, 0, (*each.shape[:-1], 1))
        return (rng.normal(size=each.shape) * sizes).astype(np.float32)

    return jax.tree.map(draw, SPECS)


def make(optimizer: Optimizer, state_dtype: StateDtype, **others: Any) -> optax.GradientTransformation:
    optim = replace(OPTIM, optimizer=optimizer, state_dtype=state_dtype, **others)
    return make_optimizer(optim, steps=9, specs=SPECS)


@needs_torch
@pytest.mark.slow(12)
def test_codes_and_values_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    out = tmp_path / "blocks.npz"
    script = Path(__file__).with_name("blocks_torch.py")
    subprocess.run([TORCH_PYTHON, script, out], check=True, capture_output=True)
    theirs = np.load(out)
    for name, signed in (("signed", True), ("unsigned", False)):
        blocks = to_blocks(jnp.asarray(theirs[f"{name}_numbers"]), signed=signed)
        np.testing.assert_array_equal(blocks.scales, theirs[f"{name}_scales"])
        np.testing.assert_array_equal(blocks.codes, theirs[f"{name}_codes"])
        np.testing.assert_allclose(from_blocks(blocks, signed=signed), theirs[f"{name}_whole"], rtol=3e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_value_is_chosen(signed: bool) -> None:
    values = np.asarray(decode(jnp.arange(256, dtype=jnp.uint8), signed=signed))
    assert (np.diff(values) > 0).all() and values[-1] == 1 and values[127 if signed else 0] == 0
    rng = np.random.default_rng(0)
    numbers = rng.uniform(-1 if signed else 0, 1, 20_000) * 10 ** rng.uniform(-9, 0, 20_000)
    numbers = np.concatenate([values, numbers, [1, -1 if signed else 0]]).astype(np.float32)
    found = np.asarray(encode(jnp.asarray(numbers), signed=signed))
    np.testing.assert_array_equal(found, np.abs(numbers[:, None] - values).argmin(axis=1))
    np.testing.assert_array_equal(found[:256], np.arange(256))


def test_blocks_keep_zero_and_show_what_is_not_a_number() -> None:
    array = jnp.zeros((2, 512)).at[1, 300].set(jnp.nan)
    whole = np.asarray(from_blocks(to_blocks(array, signed=True), signed=True))
    assert not whole[0].any() and not whole[1, :256].any() and np.isnan(whole[1, 300])


def test_rounding_at_random_is_right_on_average() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32).at[0].set(0.75)
    rounded = jax.vmap(lambda key: round_at_random(x, key))(jax.random.split(jax.random.key(1), 4096))
    rounded = np.asarray(rounded, np.float32)
    step = np.abs(x) * 2.0**-7
    assert (np.abs(rounded - x) <= step).all() and (rounded[:, 0] == 0.75).all()
    assert (np.abs(rounded.mean(axis=0) - x) < 5 * step / 4096**0.5).all()
    special = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(round_at_random(special, jax.random.key(0)).astype(jnp.float32), special)


def test_small_changes_add_up_only_if_rounded_at_random() -> None:
    """A second moment that starts at 0 and approaches 1 by a thousandth of the distance at a time."""
    tree = {name: {"w": np.ones(each, np.float32)} for name, each in {"blocks": (1, 4096)}.items()}
    specs = {"blocks": {"w": spec("matrix", (1, 4096), "layers", "embed")}}
    reached = {}
    dtypes: tuple[StateDtype, ...] = ("float32", "bfloat16", "bfloat16_stochastic")
    for dtype in dtypes:
        optim = replace(OPTIM, optimizer=AdamW(b2=0.999), state_dtype=dtype)
        tx = make_optimizer(optim, steps=9, specs=specs)
        step = jax.jit(lambda state, tx=tx: tx.update(tree, state, tree)[1])
        state = tx.init(tree)
        for _ in range(1000):
            state = step(state)
        reached[dtype] = float(optax.tree.get(state, "nu")["blocks"]["w"].astype(jnp.float32).mean())
    assert reached["float32"] == pytest.approx(1 - 0.999**1000, rel=1e-3)
    assert reached["bfloat16_stochastic"] == pytest.approx(reached["float32"], rel=0.01)
    assert reached["bfloat16"] < 0.8 * reached["float32"]


@pytest.mark.parametrize("optimizer", [AdamW(), Muon(), Lion(), SGD()], ids=lambda each: type(each).__name__)
def test_blocks_take_a_quarter_of_the_bytes(optimizer: Optimizer) -> None:
    """A byte for a number, and four for the 64 to 256 of a block; small and odd arrays stay float32."""
    whole, small = (jax.eval_shape(make(optimizer, dtype).init, drawn(0)) for dtype in ("float32", "8bit"))
    size = sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(small))
    in_blocks = [x for x in jax.tree.leaves(small, is_leaf=lambda x: isinstance(x, Blocks8)) if isinstance(x, Blocks8)]
    expected = sum(4 * x.size for x in jax.tree.leaves(whole))
    for x in in_blocks:
        assert (x.codes.dtype, x.scales.dtype) == (jnp.uint8, jnp.float32)
        assert x.codes.shape[-1] // x.scales.shape[-1] == min(x.codes.shape[-1], 256)
        expected -= 3 * x.codes.size - 4 * x.scales.size
    assert len(in_blocks) == (4 if isinstance(optimizer, AdamW) else 2)
    assert size == expected


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16_stochastic"])
@pytest.mark.parametrize("shardings", [SHARDINGS, TRANSPOSED], ids=["rows", "last"])
@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=lambda each: type(each).__name__)
def test_the_state_is_the_same_on_every_mesh(optimizer: Optimizer, shardings: Any, state_dtype: StateDtype) -> None:
    """Also where devices hold a part of a block; nothing as large as a parameter is gathered for it."""
    tx = make(optimizer, state_dtype)

    def train(place: Any) -> Any:
        params = place(drawn(0))
        state = jax.jit(tx.init)(params)
        for seed in (1, 2):
            _, state = jax.jit(tx.update)(place(drawn(seed)), state, params)
        return state

    want = train(lambda tree: jax.tree.map(jnp.asarray, tree))
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"))):
        got = train(lambda tree: jax.tree.map(jax.device_put, tree, shardings))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(float), b.astype(float)), *map(jax.device_get, (got, want))
    )
    if isinstance(optimizer, AdamW):
        momentum = optax.tree.get(got, "mu")["blocks"]["up"]
        codes = momentum.codes if isinstance(momentum, Blocks8) else momentum
        assert codes.sharding.spec == shardings["blocks"]["up"]


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=lambda each: type(each).__name__)
def test_offloading_keeps_blocks(optimizer: Optimizer) -> None:
    """One layer at a time, each stored as among all layers."""
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"))):
        place = lambda tree: jax.tree.map(jax.device_put, tree, SHARDINGS)  # noqa: E731
        found = []
        for offload in (False, True):
            tx = make(optimizer, "8bit", offload=offload)
            params = place(drawn(0))
            state = jax.jit(tx.init)(params)
            found.append(jax.jit(tx.update)(place(drawn(1)), state, params))
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert (one.shape, one.dtype, one.sharding.spec) == (other.shape, other.dtype, other.sharding.spec)
        if one.dtype == jnp.uint8:  # a number between two values may be rounded to the other one
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
