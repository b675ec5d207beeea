"""`ParamSpec` declares a parameter: shape, logical axes, initializer and role.

A model is built from `ParamSpec`s and holds no arrays until `Program.init` creates them. Sharding, initialization,
weight decay and the optimizer's treatment all follow from this declaration, so they cannot disagree.
"""

import fnmatch
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.rules import Role

type PyTree = Any
"""A nested structure that `jax.tree` maps over: of arrays, specs or shardings."""

type Batch = Mapping[str, jax.Array]
"""The arrays of a batch by name; the first dimension counts samples."""

type Sums = dict[str, jax.Array]
"""Sums over a batch by name."""

type Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype, PartitionSpec | None], jax.Array]
"""`(key, shape, dtype, out_sharding) -> array`; the values do not depend on the sharding."""

type ParamState = Literal["trained", "frozen", "buffer"]


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """The declaration of one parameter.

    Attributes:
        shape: global shape, stacked layers first.
        axes: the logical axis of each dimension (see `ShardingRules`); None is an unsharded dimension.
        init: creates the initial values.
        role: selects the optimizer's treatment (weight decay, Muon).
        in_dims: input dimensions of the parameter's matmul, which contracts them; empty without a matmul.
        out_dims: output dimensions of the matmul.
        state: "trained" by the optimizer, "frozen" at its initial value, or a "buffer" that the model updates.
        dtype: dtype of its own, as of a buffer; None is `precision.params`, or `precision.frozen` if it is frozen.
        fan_in, fan_out: sizes of these dimensions over those at the base width (see `optim.mup`).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    role: Role
    in_dims: tuple[int, ...] = ()
    out_dims: tuple[int, ...] = ()
    state: ParamState = "trained"
    dtype: str | None = None
    fan_in: float = 1.0
    fan_out: float = 1.0

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


type ParamSpecs = dict[str, ParamSpec | ParamSpecs]
"""The `ParamSpec`s of a model, a nested dict."""

type Params = dict[str, jax.Array | Params]
"""The parameters of a model, a nested dict."""


def leaf_name(path: jax.tree_util.KeyPath) -> str:
    """Returns the name of a leaf: its path in a tree, such as `blocks.mlp.up.weight` or `opt_state.0.mu`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by name, in its order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of leaves by name; inverts `leaves_by_name`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def select_trainable(tree: PyTree, specs: PyTree) -> PyTree:
    """Removes parameters that are not trained from a nested dict; `specs` are its `ParamSpec`s.

    A tree from which they were removed before stays the same.
    """
    if isinstance(specs, ParamSpec):
        return tree
    return {
        name: select_trainable(tree[name], spec)
        for name, spec in specs.items()
        if not isinstance(spec, ParamSpec) or spec.state == "trained"
    }


def merge_trees(tree: PyTree, updates: PyTree) -> PyTree:
    """Replaces and adds leaves of a nested dict: `{"a": 1, "b": 2}` with `{"b": 3, "c": 4}` has all three names."""
    if not isinstance(tree, dict):
        return updates
    return tree | {name: merge_trees(tree[name], value) if name in tree else value for name, value in updates.items()}


def freeze(specs: ParamSpecs, paths: PyTree, patterns: Sequence[str]) -> ParamSpecs:
    """Marks parameters as frozen if a pattern matches their path or a parent of it: `blocks.mlp`, `*.bias`.

    `paths` has the path of each parameter, in the same nested dict.
    """
    matching = matching_paths(jax.tree.leaves(paths), patterns, "optim.frozen")

    def freeze_matching(spec: ParamSpec, path: str) -> ParamSpec:
        return replace(spec, state="frozen") if spec.state == "trained" and path in matching else spec

    frozen = jax.tree.map(freeze_matching, specs, paths)
    if all(spec.state != "trained" for spec in jax.tree.leaves(frozen)):
        raise ConfigError(f"optim.frozen={','.join(patterns)}: leaves no parameter to train; name fewer")
    return frozen


def matching_paths(paths: Sequence[str], patterns: Sequence[str], field: str) -> set[str]:
    """Returns the paths that a pattern matches, or of which it matches a parent.

    Raises ConfigError, with the name of the field, if a pattern matches none.
    """
    found = {pattern: {path for path in paths if _matches(path, pattern)} for pattern in patterns}
    for pattern, matching in found.items():
        if not matching:
            parts = ", ".join(sorted({path.partition(".")[0] for path in paths}))
            raise ConfigError(f"{field}={pattern}: no parameter of the model has this path; its parts are {parts}")
    return set().union(*found.values())


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def normal(stddev: float) -> Initializer:
    """Initializes with independent normal values, drawn in float32."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, out: PartitionSpec | None) -> jax.Array:
        values = stddev * jax.random.normal(key, shape, jnp.float32, out_sharding=out)
        return values.astype(dtype)

    return init


def uniform(bound: float) -> Initializer:
    """Initializes with independent values between `-bound` and `bound`, drawn in float32."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, out: PartitionSpec | None) -> jax.Array:
        values = jax.random.uniform(key, shape, jnp.float32, -bound, bound, out_sharding=out)
        return values.astype(dtype)

    return init


def constant(value: float) -> Initializer:
    """Initializes every element with `value`."""
    return lambda key, shape, dtype, out: jnp.full(shape, value, dtype, out_sharding=out)


def param_key(key: jax.Array, path: str) -> jax.Array:
    """Returns the random key of the parameter at `path`; it is independent of other parameters."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
