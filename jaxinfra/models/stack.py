"""A scan over stacked layers that are not all treated alike: a short pattern, repeated.

A group of layers, one of each of the pattern, is one step of the scan: compile time grows with the pattern and not
with the layers. Layers that are left over at the end come after the scan, one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

type Tree = Any
type Step = Callable[[jax.Array, Tree], tuple[jax.Array, Tree]]


def scan_pattern(steps: Sequence[Step], x: jax.Array, xs: Tree) -> tuple[jax.Array, Tree]:
    """`jax.lax.scan(step, x, xs)` with `steps[i % len(steps)]` as step i: `x` after the last layer, and stacked `y`.

    Steps are `(x, layer) -> (x, y)` and yield alike; stacked layers are `[L, ...]`, L whole on every device.
    """
    if len(steps) == 1:
        return jax.lax.scan(steps[0], x, xs)
    count = len(jax.tree.leaves(xs)[0])
    groups, left = divmod(count, len(steps))

    def one_by_one(x: jax.Array, xs: Tree, steps: Sequence[Step] = steps) -> tuple[jax.Array, Tree]:
        ys = []
        for step, layer in zip(steps, _apart(xs, len(steps)), strict=True):
            x, y = step(x, layer)
            ys.append(y)
        return x, jax.tree.map(_joined, *ys)

    found = []
    if groups:
        whole = xs if not left else jax.tree.map(lambda a: a[: count - left], xs)
        x, ys = jax.lax.scan(one_by_one, x, jax.tree.map(lambda a: _shaped(a, groups, len(steps)), whole))
        found.append(jax.tree.map(lambda a: _shaped(a, count - left), ys))
    if left:
        x, ys = one_by_one(x, jax.tree.map(lambda a: a[count - left :], xs), steps[:left])
        found.append(ys)
    return x, found[0] if len(found) == 1 else jax.tree.map(lambda *y: jnp.concatenate(y), *found)


def _apart(xs: Tree, count: int) -> list[Tree]:
    """`[count, ...]` as a list. Split, not indexed: gradients of parts are then joined, not padded and added."""
    leaves, tree = jax.tree.flatten(xs)
    parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [tree.unflatten([jax.lax.squeeze(part[i], (0,)) for part in parts]) for i in range(count)]


def _joined(*ys: jax.Array) -> jax.Array:
    """`[count, ...]` of a list. Not `jnp.stack`, nor `expand_dims`: they have no gradient for partial sums."""
    spec = jax.typeof(ys[0]).sharding.spec
    out = spec.update(partitions=(None, *spec.partitions))
    return jnp.concatenate([y.reshape(1, *y.shape, out_sharding=out) for y in ys])


def _shaped(a: jax.Array, *lead: int) -> jax.Array:
    """`[L, ...]` to `[groups, layers of a group, ...]`, or back; these dimensions are whole on every device."""
    old, spec = 3 - len(lead), jax.typeof(a).sharding.spec
    out = spec.update(partitions=((None,) * len(lead) + spec.partitions[old:]))
    return a.reshape(*lead, *a.shape[old:], out_sharding=out)
