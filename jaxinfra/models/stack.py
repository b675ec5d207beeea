"""A scan over stacked layers with a repeated pattern of step functions, such as alternating remat policies.

One step of the scan applies the whole pattern, so compile time grows with the pattern, not with the number of layers.
The remaining layers are applied one by one after the scan.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

type Tree = Any
type Step = Callable[[jax.Array, Tree], tuple[jax.Array, Tree]]


def scan_pattern(steps: Sequence[Step], x: jax.Array, xs: Tree) -> tuple[jax.Array, Tree]:
    """Computes `jax.lax.scan` with `steps[i % len(steps)]` as step i: returns the last `x`, and all `y` stacked.

    Steps are `(x, layer) -> (x, y)`. The arrays in `xs` are `[L, ...]`; L is not sharded.
    """
    if len(steps) == 1:
        return jax.lax.scan(steps[0], x, xs)
    num_layers = len(jax.tree.leaves(xs)[0])
    groups, rest = divmod(num_layers, len(steps))

    def apply_group(x: jax.Array, xs: Tree, steps: Sequence[Step] = steps) -> tuple[jax.Array, Tree]:
        ys = []
        for step, layer in zip(steps, _unstack(xs, len(steps)), strict=True):
            x, y = step(x, layer)
            ys.append(y)
        return x, jax.tree.map(_stack, *ys)

    results = []
    if groups:
        whole = jax.tree.map(lambda a: a[: num_layers - rest], xs) if rest else xs
        grouped = jax.tree.map(lambda a: _reshape_layers(a, groups, len(steps)), whole)
        x, ys = jax.lax.scan(apply_group, x, grouped)
        results.append(jax.tree.map(lambda a: _reshape_layers(a, num_layers - rest), ys))
    if rest:
        x, ys = apply_group(x, jax.tree.map(lambda a: a[num_layers - rest :], xs), steps[:rest])
        results.append(ys)
    return x, results[0] if len(results) == 1 else jax.tree.map(lambda *y: jnp.concatenate(y), *results)


def _unstack(xs: Tree, count: int) -> list[Tree]:
    """Splits arrays `[count, ...]` with `split` instead of indexing: its gradient concatenates, without padded sums."""
    leaves, tree = jax.tree.flatten(xs)
    parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [tree.unflatten([jax.lax.squeeze(part[i], (0,)) for part in parts]) for i in range(count)]


def _stack(*ys: jax.Array) -> jax.Array:
    """Stacks arrays; `jnp.stack` and `expand_dims` have no gradient for partial sums."""
    spec = jax.typeof(ys[0]).sharding.spec
    out = spec.update(partitions=(None, *spec.partitions))
    return jnp.concatenate([y.reshape(1, *y.shape, out_sharding=out) for y in ys])


def _reshape_layers(a: jax.Array, *lead: int) -> jax.Array:
    """Reshapes `[L, ...]` to `[groups, layers of a group, ...]`, or back; these dimensions are not sharded."""
    old, spec = 3 - len(lead), jax.typeof(a).sharding.spec
    out = spec.update(partitions=((None,) * len(lead) + spec.partitions[old:]))
    return a.reshape(*lead, *a.shape[old:], out_sharding=out)
