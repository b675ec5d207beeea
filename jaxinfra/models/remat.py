"""Rematerialization: what a layer saves for the backward pass, and what is computed again."""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from jaxinfra.config import Problem
from jaxinfra.ops.attention import ATTENTION_OUT, ATTENTION_RESIDUALS
from jaxinfra.parallel.sharding import GATHERED_WEIGHT

type TensorName = Literal[
    "layer_input", "query", "key", "value", "attention_out", "out_proj", "mlp_gate", "mlp_up", "mlp_down"
]


@dataclass(frozen=True, kw_only=True)
class Named:
    """Saves tensors by their names, and computes all others again.

    Queries and keys are those that attention reads, after their norm and rotation. The names of an MLP are also those
    of experts: their rows, and for `mlp_down` the outputs before they are weighted and summed. A layer that lacks a
    tensor ignores its name. The input of a layer is saved unless it is offloaded.

    Attributes:
        save: stay in the memory of the device.
        offload: go to the memory of the host, and come back in the backward pass.
    """

    save: tuple[TensorName, ...] = ()
    offload: tuple[TensorName, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields a name that is in both."""
        for name in self.offload:
            if name in self.save:
                yield Problem(fields=("save", "offload"), message=f"{name} is in both", fix="leave it out of one")


type Remat = Literal["none", "weights", "dots_and_attention", "dots", "full", "offload"] | Named

DOT = "dot"
"""The name under which policies save the output of a matmul with a weight."""


def save_dot(y: jax.Array) -> jax.Array:
    """Names the output of a matmul with a weight, for the policies that save it."""
    # JAX's own policies save the outputs of all matmuls. But a row-parallel one returns partial sums, which can be
    # neither stacked over layers nor moved to the host: the name marks the array after the reduce-scatter.
    return checkpoint_name(y, DOT)


WATCH: ContextVar[Callable[[TensorName, jax.Array], None]] = ContextVar("WATCH", default=lambda name, x: None)
"""Called with each named tensor while a model is traced."""


def name_tensor(x: jax.Array, name: TensorName) -> jax.Array:
    """Names a tensor of a layer for `Named` and `WATCH`."""
    WATCH.get()(name, x)
    return checkpoint_name(x, name)


def _all_but_gathered_weights(primitive: Primitive, *_: Any, **params: Any) -> bool:
    """The policy "weights": whether to save the output of a primitive."""
    # Resharded activations are saved by their own checkpoint name; a reshape costs nothing.
    return primitive.name not in ("reshard", "reshape") and params.get("name") != GATHERED_WEIGHT


def _by_name(save: Iterable[str], offload: Iterable[str]) -> Callable[..., Any]:
    """Returns the JAX policy that saves and offloads by checkpoint name."""

    def names(tensors: Iterable[str]) -> list[str]:
        found = list(tensors)
        return found + [ATTENTION_RESIDUALS] * (ATTENTION_OUT in found)  # of a kernel that names what it needs

    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=names(save),
        names_which_can_be_offloaded=names(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )


def remat[**P, R](layer: Callable[P, R], policy: Remat, *, alone: bool = True) -> Callable[P, R]:
    """Applies a policy to a layer that is scanned over.

    Args:
        layer: the layer as a function.
        policy: what is saved. "none": no rematerialization, everything is saved; with fsdp that includes the gathered
            weights, so the whole model on every device. "weights": everything but gathered weights, which are gathered
            again. "dots": outputs of matmuls with weights. "dots_and_attention": on TPUs also the output of attention,
            so that its kernel runs forward only once. "full": full rematerialization, only the input of the layer.
            "offload": as "dots", but in host memory. `Named`: tensors by their names.
        alone: whether the scan is a loop, and one step of it applies this layer only.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return layer
    if isinstance(policy, Named):
        chosen = _by_name(policy.save, policy.offload)
    else:
        chosen = {
            "weights": _all_but_gathered_weights,
            "full": policies.nothing_saveable,
            "dots": policies.save_only_these_names(DOT),
            "dots_and_attention": policies.save_only_these_names(DOT, ATTENTION_RESIDUALS),
            "offload": _by_name((), (DOT,)),
        }[policy]
    # A scan keeps the compiler from merging recomputation with the forward pass (common subexpression elimination).
    # With several layers in a step, or without a loop, JAX must prevent it.
    return jax.checkpoint(layer, policy=chosen, prevent_cse=not alone)
