"""Rematerialisation by name: what a layer keeps for the backward pass and what is computed again."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxinfra.ops.attention import ATTENTION_RESIDUALS
from jaxinfra.parallel.sharding import GATHERED_WEIGHT

type Remat = Literal["none", "weights", "dots_and_attention", "dots", "full", "offload"]

PRODUCT = "product"


def product(y: jax.Array) -> jax.Array:
    """Marks the result of a product with a weight, for the policies that keep it.

    Marked by name, not found by primitive: what a sharded contraction yields is a partial sum until it is
    scattered, and a partial sum can be neither stacked over layers nor moved to the host.
    """
    return checkpoint_name(y, PRODUCT)


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy: keeps everything but gathered weights, in every form: as moved, by their name, and reshaped.

    Activations that are moved have a name of their own, by which they are kept; to reshape one again costs nothing.
    """
    return primitive.name not in ("reshard", "reshape") and params.get("name") != GATHERED_WEIGHT


def remat[**P, R](layer: Callable[P, R], policy: Remat, *, alone: bool = True) -> Callable[P, R]:
    """`layer`, which is scanned over, with the given policy; `alone` if it is all that a step of the scan does.

    - `none`: everything is kept; under fsdp gathered weights too, in the end the whole model on every device.
    - `weights`: everything is kept but gathered weights, which are gathered again.
    - `dots`: results of matrix products with weights are kept; the rest is computed again.
    - `dots_and_attention`: as `dots`, and on TPUs what attention yields: its kernel runs forward once, not twice.
    - `full`: only the input of the layer is kept.
    - `offload`: as `dots`, but what is kept waits in host memory.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return layer
    chosen = {
        "weights": _all_but_gathered,
        "full": policies.nothing_saveable,
        "dots": policies.save_only_these_names(PRODUCT),
        "dots_and_attention": policies.save_only_these_names(PRODUCT, ATTENTION_RESIDUALS),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PRODUCT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    # A scan keeps forward and backward apart by itself: nothing there could be merged that should not be. But among
    # several layers in a step the compiler is to compute one again only when the gradient has come down to it.
    return jax.checkpoint(layer, policy=chosen, prevent_cse=not alone)
