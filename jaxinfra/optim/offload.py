"""An optimiser whose arrays wait in host memory between steps, and come to the devices layer by layer.

A step of it needs on the devices what it always needs there, gradients and parameters, and of its own state that of
one layer. Not for averaged weights: they are evaluated and sampled from where they are.

Invariant: the tree of the state is that of the optimiser without offloading, and so, but for rounding, are the numbers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

type Build = Callable[[Any], optax.GradientTransformation]
"""Makes the optimiser of parameters declared by a tree of specs."""


def store_state_on_host(build: Build, specs: dict[str, Any]) -> optax.GradientTransformation:
    """`build(specs)` with the arrays of its state in host memory; scalars and counters stay on the devices.

    The state of stacked layers is moved and used one layer at a time, in a loop over the gradients: without one the
    compiler moves all of it as early as it can. Other parameters, and layers that pipeline stages have shared out,
    move whole.
    """

    def is_params(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == specs.keys()

    def part(tree: Any, names: list[str]) -> Any:
        """The state, gradients or parameters without what is of others."""
        return jax.tree.map(
            lambda node: {name: node[name] for name in names} if is_params(node) else node, tree, is_leaf=is_params
        )

    def merged(tree: Any, *parts: Any) -> Any:
        """What `part` took apart; of counters the first."""

        def one(node: Any, *found: Any) -> Any:
            return {name: next(p[name] for p in found if name in p) for name in node} if is_params(node) else found[0]

        return jax.tree.map(one, tree, *parts, is_leaf=is_params)

    def init(params: optax.Params) -> optax.OptState:
        return _to_host(build(specs).init(params))

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        streamed = [name for name in specs if _is_stacked(specs[name], updates[name])]
        others = [name for name in specs if name not in streamed]
        results = []
        if others:
            tx = build(part(specs, others))
            results.append(_whole(tx, *(part(tree, others) for tree in (updates, state, params))))
        for name in streamed:  # each is a stack of its own length
            of_one = jax.tree.map(lambda spec: replace(spec, shape=(1, *spec.shape[1:])), part(specs, [name]))
            stacked = (part(tree, [name]) for tree in (updates, state, params))
            results.append(_layer_by_layer(build(of_one), *stacked))
        moved, states = zip(*results, strict=True)
        return merged(updates, *moved), merged(state, *states)

    return optax.GradientTransformation(init, update)


class _Split(NamedTuple):
    """A state whose arrays are apart from its counters."""

    tree: Any
    arrays: dict[int, jax.Array]
    counters: dict[int, jax.Array]

    @classmethod
    def of(cls, state: Any) -> "_Split":
        leaves, tree = jax.tree.flatten(state)
        arrays = {at: leaf for at, leaf in enumerate(leaves) if leaf.ndim}
        return cls(tree, arrays, {at: leaf for at, leaf in enumerate(leaves) if not leaf.ndim})

    def joined(self, arrays: dict[int, jax.Array]) -> Any:
        leaves = self.counters | arrays
        return self.tree.unflatten([leaves[at] for at in range(len(leaves))])


def _whole(tx: optax.GradientTransformation, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
    split = _Split.of(state)
    here = jax.device_put(split.arrays, jax.memory.Space.Device)
    updates, state = tx.update(updates, split.joined(here), params)
    return updates, _to_host(state)


def _layer_by_layer(tx: optax.GradientTransformation, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """`tx`, made for one layer, over stacked layers; counters come back as they were."""
    split = _Split.of(state)
    (count,) = {len(leaf) for leaf in jax.tree.leaves(updates)}

    def layer(stacked: Any, number: jax.Array) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number), stacked)

    def put(stacked: Any, one: Any, number: jax.Array) -> Any:
        return jax.tree.map(lambda a, n: jax.lax.dynamic_update_index_in_dim(a, n, number, 0), stacked, one)

    # Both are overwritten in place, layer by layer: updates need no memory beside that of the gradients.
    def step(at: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], None]:
        updates, arrays = at
        here = jax.device_put(layer(arrays, number), jax.memory.Space.Device)
        moved, new = tx.update(layer(updates, number), split.joined(here), layer(params, number))
        return (put(updates, moved, number), put(arrays, _Split.of(_to_host(new)).arrays, number)), None

    (updates, arrays), _ = jax.lax.scan(step, (updates, split.arrays), jnp.arange(count))
    return updates, split.joined(arrays)


def _to_host(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, state)


def _is_stacked(specs: Any, arrays: Any) -> bool:
    """Whether these parameters are stacked layers, all of them whole on every device."""
    first = (spec.axes[:1] == ("layers",) for spec in jax.tree.leaves(specs))
    whole = (jax.typeof(a).sharding.spec.partitions[:1] in ((), (None,)) for a in jax.tree.leaves(arrays))
    return all(first) and all(whole)
