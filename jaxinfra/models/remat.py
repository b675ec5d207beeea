"""Rematerialisation by name: what a layer keeps for the backward pass and what is computed again."""

from collections.abc import Callable
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

type Remat = Literal["none", "dots", "full", "offload"]

PRODUCT = "product"


def product(y: jax.Array) -> jax.Array:
    """Marks the result of a product with a weight, for the policies that keep it.

    Marked by name, not found by primitive: what a sharded contraction yields is a partial sum until it is
    scattered, and a partial sum can be neither stacked over layers nor moved to the host.
    """
    return checkpoint_name(y, PRODUCT)


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
        return jax.checkpoint(layer, policy=policies.save_only_these_names(PRODUCT))
    offload = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(layer, policy=offload)
