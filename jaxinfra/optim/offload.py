"""Keeps optimizer state in host memory between steps, and moves it to the devices layer by layer.

A step needs device memory for gradients, parameters and the state of one layer. The average of parameters (EMA) is not
offloaded. The state has the same tree as without offloading and, up to rounding, the same values.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from jaxinfra.parallel.spec import PyTree

type OptimizerFactory = Callable[[PyTree], optax.GradientTransformation]
"""Makes the optimizer for parameters, given a tree of their `ParamSpec`s."""


def store_state_on_host(make: OptimizerFactory, specs: dict[str, PyTree]) -> optax.GradientTransformation:
    """Wraps `make(specs)` to keep the arrays of its state in host memory; scalars stay on the devices.

    The state of stacked layers is moved and used one layer at a time. Other parameters, and layers that are sharded
    over pipeline stages, move at once.
    """

    def is_params(node: PyTree) -> bool:
        """Returns whether a node of a state is a dict of all parameters, such as the first moments of Adam."""
        return isinstance(node, dict) and node.keys() == specs.keys()

    def select(tree: PyTree, names: list[str]) -> PyTree:
        """Keeps only these parameters in every dict of parameters in the tree."""
        return jax.tree.map(
            lambda node: {name: node[name] for name in names} if is_params(node) else node, tree, is_leaf=is_params
        )

    def merge(tree: PyTree, *parts: PyTree) -> PyTree:
        """Reverses `select`; counters come from the first part."""

        def merge_node(node: PyTree, *parts: PyTree) -> PyTree:
            if not is_params(node):
                return parts[0]
            return {name: next(part[name] for part in parts if name in part) for name in node}

        return jax.tree.map(merge_node, tree, *parts, is_leaf=is_params)

    def init(params: optax.Params) -> optax.OptState:
        return _to_host(make(specs).init(params))

    def update(updates: PyTree, state: optax.OptState, params: PyTree = None) -> tuple[PyTree, optax.OptState]:
        trees = (updates, state, params)
        stacked = [name for name in specs if _is_stacked(specs[name], updates[name])]
        others = [name for name in specs if name not in stacked]
        results = []
        if others:
            own_updates, own_state, own_params = (select(tree, others) for tree in trees)
            tx = make(select(specs, others))
            own_updates, own_state = tx.update(own_updates, _to_device(own_state), own_params)
            results.append((own_updates, _to_host(own_state)))
        for name in stacked:  # one by one, since they can differ in their number of layers
            layer_specs = jax.tree.map(lambda spec: replace(spec, shape=(1, *spec.shape[1:])), select(specs, [name]))
            results.append(_update_by_layer(make(layer_specs), *(select(tree, [name]) for tree in trees)))
        new_updates, states = zip(*results, strict=True)
        return merge(updates, *new_updates), merge(state, *states)

    return optax.GradientTransformation(init, update)


def _split(state: optax.OptState) -> tuple[optax.OptState, optax.OptState]:
    """Splits a state into its arrays and its counters (scalars), each with None in place of the other."""
    return jax.tree.map(lambda x: x if x.ndim else None, state), jax.tree.map(lambda x: None if x.ndim else x, state)


def _combine(arrays: optax.OptState, counters: optax.OptState) -> optax.OptState:
    """Reverses `_split`."""
    return jax.tree.map(lambda a, c: c if a is None else a, arrays, counters, is_leaf=lambda x: x is None)


def _update_by_layer(
    tx: optax.GradientTransformation, updates: PyTree, state: optax.OptState, params: PyTree
) -> tuple[PyTree, optax.OptState]:
    """Updates stacked layers with `tx`, the optimizer of one layer; counters are returned unchanged."""
    all_arrays, counters = _split(state)
    (num_layers,) = {len(leaf) for leaf in jax.tree.leaves(updates)}

    def select(stacked: PyTree, layer: jax.Array) -> PyTree:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer), stacked)

    def write(stacked: PyTree, value: PyTree, layer: jax.Array) -> PyTree:
        return jax.tree.map(lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, layer, 0), stacked, value)

    # A scan, since the compiler would move the state of all layers at the start of an unrolled loop. Both parts of the
    # carry are overwritten in place: updates reuse the memory of the gradients.
    def step(carry: tuple[PyTree, PyTree], layer: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        updates, arrays = carry
        state = _to_device(_combine(select(arrays, layer), counters))
        update, state = tx.update(select(updates, layer), state, select(params, layer))
        new_arrays, _ = _split(_to_host(state))
        return (write(updates, update, layer), write(arrays, new_arrays, layer)), None

    (updates, arrays), _ = jax.lax.scan(step, (updates, all_arrays), jnp.arange(num_layers))
    return updates, _combine(arrays, counters)


def _to_host(state: optax.OptState) -> optax.OptState:
    """Moves the arrays of a state to host memory; `_to_device` moves them back."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, state)


def _to_device(state: optax.OptState) -> optax.OptState:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, state)


def _is_stacked(specs: PyTree, arrays: PyTree) -> bool:
    """Returns whether these parameters are stacked layers that are not sharded over layers."""
    stacked = (spec.axes[:1] == ("layers",) for spec in jax.tree.leaves(specs))
    unsharded = (jax.typeof(a).sharding.spec.partitions[:1] in ((), (None,)) for a in jax.tree.leaves(arrays))
    return all(stacked) and all(unsharded)
