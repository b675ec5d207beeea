"""A scan over stacked layers with a repeated pattern of step functions, such as alternating remat policies.

One step of the scan applies the whole pattern, so compile time grows with the pattern, not with the number of layers.
With a pattern of 3 and 11 layers, the scan has 3 steps, and the remaining 2 layers are applied after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

type Tree = Any
"""Nested arrays `[L, ...]`, or those of one layer."""

type Step = Callable[[jax.Array, Tree], tuple[jax.Array, Tree]]


def scan_pattern(steps: Sequence[Step], x: jax.Array, xs: Tree, *, unroll: bool = False) -> tuple[jax.Array, Tree]:
    """Computes `jax.lax.scan` with `steps[i % len(steps)]` as step i: returns the last `x`, and all `y` stacked.

    Steps are `(x, layer) -> (x, y)`. The arrays in `xs` are `[L, ...]` for L layers, a dimension that is not sharded.
    `unroll` makes no loop.
    """
    if len(steps) == 1:
        return jax.lax.scan(steps[0], x, xs, unroll=unroll)
    num_layers = len(jax.tree.leaves(xs)[0])
    groups, rest = divmod(num_layers, len(steps))
    num_scanned = num_layers - rest

    def apply_group(x: jax.Array, xs: Tree, steps: Sequence[Step] = steps) -> tuple[jax.Array, Tree]:
        ys = []
        for step, layer in zip(steps, unstack(xs, len(steps)), strict=True):
            x, y = step(x, layer)
            ys.append(y)
        return x, jax.tree.map(stack_trees, *ys)

    results = []
    if groups:
        grouped = jax.tree.map(lambda a: _reshape_layers(a[:num_scanned], 1, groups, len(steps)), xs)
        x, ys = jax.lax.scan(apply_group, x, grouped, unroll=unroll)
        results.append(jax.tree.map(lambda a: _reshape_layers(a, 2, num_scanned), ys))
    if rest:
        x, ys = apply_group(x, jax.tree.map(lambda a: a[num_scanned:], xs), steps[:rest])
        results.append(ys)
    return x, jax.tree.map(lambda *ys: jnp.concatenate(ys), *results)


def unstack(xs: Tree, count: int) -> list[Tree]:
    """Returns one tree for each entry of the arrays `[count, ...]`."""
    leaves, structure = jax.tree.flatten(xs)
    # The gradient of indexing would add arrays that are padded with zeros; that of `split` concatenates.
    parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [structure.unflatten([jax.lax.squeeze(part[i], (0,)) for part in parts]) for i in range(count)]


def stack_trees(*ys: jax.Array) -> jax.Array:
    """Stacks arrays; `jnp.stack` and `expand_dims` have no gradient for partial sums."""
    spec = jax.typeof(ys[0]).sharding.spec
    out = spec.update(partitions=(None, *spec.partitions))
    return jnp.concatenate([y.reshape(1, *y.shape, out_sharding=out) for y in ys])


def _reshape_layers(a: jax.Array, num_dims: int, *shape: int) -> jax.Array:
    """Reshapes the first `num_dims` dimensions, which are not sharded, to `shape`."""
    spec = jax.typeof(a).sharding.spec
    out = spec.update(partitions=(*[None] * len(shape), *spec.partitions[num_dims:]))
    return a.reshape(*shape, *a.shape[num_dims:], out_sharding=out)
