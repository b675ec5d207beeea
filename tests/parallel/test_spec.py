"""The initial values of a parameter depend only on the seed and on its path."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import ParamSpec, constant, normal, param_key
from tests.decoders import changed, decoder
from tests.parity.cases import DOCUMENTS, Case, on_host

MODEL = decoder(vocab_size=16, num_layers=2, hidden_size=8, num_heads=2, mlp_dim=16)


def initial(seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    program = Case(run=replace(DOCUMENTS, model=changed(MODEL, **changes)), mesh=MeshConfig(fsdp=1)).program()
    with program.on_mesh:
        return on_host(program.init(jax.random.key(seed)).params)


def test_other_parameters_do_not_change_initial_values() -> None:
    plain, more = initial(), initial(qkv_bias=True, qk_norm="head", norms="both", learned_positions=16)
    assert len(more) > len(plain)
    assert {path for path, one in plain.items() if not np.array_equal(one, more[path])} == set()


def test_initial_values_depend_on_seed_and_path() -> None:
    plain, other = initial(), initial(seed=1)
    drawn = {path for path, one in plain.items() if one.std() > 0}
    assert len(drawn) == 9
    for path in drawn:
        assert not np.array_equal(plain[path], other[path])
        assert len(np.unique(plain[path])) > 0.99 * plain[path].size
    gate, up = (plain[f"blocks.mlp.{name}.weight"] for name in ("gate", "up"))
    assert abs(np.corrcoef(gate.ravel(), up.ravel())[0, 1]) < 0.2
    layers = plain["blocks.mlp.up.weight"]
    assert not np.array_equal(layers[0], layers[1])


def test_param_key_depends_on_the_path() -> None:
    key = jax.random.key(0)
    keys = [jax.random.key_data(param_key(key, path)).tolist() for path in ("a", "b", "a.b", "a")]
    assert keys[0] == keys[3]
    assert len({tuple(k) for k in keys}) == 3


def test_initializers() -> None:
    drawn = normal(0.5)(jax.random.key(0), (64, 64), jnp.dtype("float32"), None)
    assert drawn.std() == pytest.approx(0.5, rel=0.05)
    assert abs(drawn.mean()) < 0.03
    rounded = normal(0.5)(jax.random.key(0), (64, 64), jnp.dtype("bfloat16"), None)
    assert np.array_equal(rounded, drawn.astype(jnp.bfloat16))
    same = constant(1.5)(jax.random.key(0), (3,), jnp.dtype("bfloat16"), None)
    assert (same.dtype, same.tolist()) == (jnp.bfloat16, [1.5] * 3)


def test_every_dimension_needs_a_logical_axis() -> None:
    with pytest.raises(AssertionError):
        ParamSpec(shape=(2, 3), axes=("embed",), init=constant(0.0), role="matrix")
