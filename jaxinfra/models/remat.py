"""Rematerialisation by name: what a layer keeps for the backward pass and what is computed again."""

from collections.abc import Callable
from typing import Literal

import jax

type Remat = Literal["none", "dots", "full", "offload"]


def remat[**P, R](layer: Callable[P, R], policy: Remat) -> Callable[P, R]:
    """`layer` with the given policy.

    - `none`: everything is kept.
    - `dots`: results of matrix products with weights are kept; the rest is computed again.
    - `full`: only the input of the layer is kept.
    - `offload`: as `dots`, but what is kept waits in host memory.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return layer
    if policy == "full":
        return jax.checkpoint(layer, policy=policies.nothing_saveable)
    if policy == "dots":
        return jax.checkpoint(layer, policy=policies.dots_with_no_batch_dims_saveable)
    return jax.checkpoint(layer, policy=policies.offload_dot_with_no_batch_dims("device", "pinned_host"))
