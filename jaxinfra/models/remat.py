"""Rematerialization policies: what a layer saves for the backward pass, and what is recomputed."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from jaxinfra.ops.attention import ATTENTION_RESIDUALS
from jaxinfra.parallel.sharding import GATHERED_WEIGHT

type Remat = Literal["none", "weights", "dots_and_attention", "dots", "full", "offload"]

DOT = "dot"
"""The name under which policies save the output of a matmul with a weight."""


def save_dot(y: jax.Array) -> jax.Array:
    """Names the output of a matmul with a weight, for the policies that save it."""
    # JAX's own policies save the outputs of all matmuls. But a row-parallel one returns partial sums, which can be
    # neither stacked over layers nor moved to the host: the name marks the array after the reduce-scatter.
    return checkpoint_name(y, DOT)


def _all_but_gathered_weights(primitive: Primitive, *_: Any, **params: Any) -> bool:
    """The policy "weights": whether to save the output of a primitive."""
    # Resharded activations are saved by their own checkpoint name; a reshape costs nothing.
    return primitive.name not in ("reshard", "reshape") and params.get("name") != GATHERED_WEIGHT


def remat[**P, R](layer: Callable[P, R], policy: Remat, *, alone: bool = True) -> Callable[P, R]:
    """Applies a policy to a layer that is scanned over.

    Args:
        layer: the layer as a function.
        policy: what is saved. "none": no rematerialization, everything is saved; with fsdp that includes the gathered
            weights, so the whole model on every device. "weights": everything but gathered weights, which are gathered
            again. "dots": outputs of matmuls with weights. "dots_and_attention": on TPUs also the output of attention,
            so that its kernel runs forward only once. "full": full rematerialization, only the input of the layer.
            "offload": as "dots", but in host memory.
        alone: whether one step of the scan applies this layer only.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return layer
    chosen = {
        "weights": _all_but_gathered_weights,
        "full": policies.nothing_saveable,
        "dots": policies.save_only_these_names(DOT),
        "dots_and_attention": policies.save_only_these_names(DOT, ATTENTION_RESIDUALS),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[DOT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    # A scan keeps the compiler from merging recomputation with the forward pass (common subexpression elimination).
    # With several layers in a step, JAX must prevent it.
    return jax.checkpoint(layer, policy=chosen, prevent_cse=not alone)
