"""The declaration of one parameter: its shape, the names of its dimensions, its first values, its role.

A model is built out of `ParamSpec`s and holds no array until `Program.init` fills them in. Shape, sharding,
initialiser, decay mask and optimiser choice all follow from this one declaration, so they cannot disagree.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

type Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype, PartitionSpec | None], jax.Array]
"""`(key, shape, dtype, out_sharding) -> array`; the values do not depend on the sharding."""

type Role = Literal["matrix", "embedding", "head", "norm", "bias"]


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter, declared.

    Attributes:
        shape: the whole array's shape, stacked layers first.
        axes: the logical axis of each dimension (see `ShardingRules`), None for one that is never sharded.
        init: makes the first values.
        role: what it is for; optimisers choose by it (weight decay, Muon).
        in_dims: the dimensions of `shape` that its matrix product contracts (empty if there is none).
        out_dims: the dimensions of `shape` that its matrix product yields.
        trainable: whether the optimiser moves it; a model moves the others itself, and they are float32.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    role: Role
    in_dims: tuple[int, ...] = ()
    out_dims: tuple[int, ...] = ()
    trainable: bool = True

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def select_trainable(tree: Any, specs: Any) -> Any:
    """A nested dict like `specs`, one of `ParamSpec`s, without the parameters that are not trained."""
    if isinstance(specs, ParamSpec):
        return tree
    kept = {n: s for n, s in specs.items() if not isinstance(s, ParamSpec) or s.trainable}
    return {name: select_trainable(tree[name], spec) for name, spec in kept.items()}


def merge_trees(tree: Any, leaves: Any) -> Any:
    """A nested dict with those of its leaves that `leaves`, a part of such a dict, has."""
    if not isinstance(tree, dict):
        return leaves
    return {name: merge_trees(value, leaves[name]) if name in leaves else value for name, value in tree.items()}


def normal(stddev: float) -> Initializer:
    """Independent normal values of standard deviation `stddev`, drawn in float32."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, out: PartitionSpec | None) -> jax.Array:
        values = stddev * jax.random.normal(key, shape, jnp.float32, out_sharding=out)
        return values.astype(dtype)

    return init


def constant(value: float) -> Initializer:
    """The same `value` everywhere."""
    return lambda key, shape, dtype, out: jnp.full(shape, value, dtype, out_sharding=out)


def param_key(key: jax.Array, path: str) -> jax.Array:
    """The random key of the parameter at `path`: it depends on the path alone, not on the other parameters."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
