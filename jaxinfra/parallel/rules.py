"""Sharding rules: which mesh axes shard each logical axis of an array. Imports no JAX."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.parallel.mesh_config import AXES, MeshAxis

type Role = Literal["matrix", "embedding", "head", "norm", "bias"]
"""The role of a parameter, which selects the optimizer's treatment."""

type LogicalAxes = tuple[str | None, ...]
"""The logical axis of each dimension; None is unsharded."""

type Quantize = Literal["none", "int8", "fp8"]
"""The number format of matmuls with the layers' weights (see `ops.quantized`, which imports JAX)."""

type Packed = Literal["int8", "nf4"]
"""The number format of stored weights that are not trained (see `ops.packed`, which imports JAX)."""


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Maps each logical axis to mesh axes; `()` leaves it unsharded.

    Attributes:
        batch: sequences of a batch.
        sequence: positions of a sequence, everywhere (context parallelism).
        block_sequence: additional axes for positions of the residual stream between blocks (sequence parallelism).
        layers: stacked layers.
        embed: hidden size of parameters, or the rank of a low-rank projection. In activations it is unsharded. In
            parameters of experts it is sharded only by the axes that do not shard `experts`.
        heads: attention heads.
        kv_heads: heads of keys and values.
        mlp: hidden size of the MLP and of each expert.
        experts: experts of a layer; a subset of the axes of `batch`.
        vocab: rows of the embedding and columns of the head.
    """

    batch: tuple[MeshAxis, ...] = ("replica", "fsdp", "expert")
    sequence: tuple[MeshAxis, ...] = ("context",)
    block_sequence: tuple[MeshAxis, ...] = ("tensor",)
    layers: tuple[MeshAxis, ...] = ("stage",)
    embed: tuple[MeshAxis, ...] = ("fsdp", "expert", "context")
    heads: tuple[MeshAxis, ...] = ("tensor",)
    kv_heads: tuple[MeshAxis, ...] = ("tensor",)
    mlp: tuple[MeshAxis, ...] = ("tensor",)
    experts: tuple[MeshAxis, ...] = ("expert",)
    vocab: tuple[MeshAxis, ...] = ("tensor",)

    def problems(self) -> Iterable[Problem]:
        """Yields mesh axes that shard two dimensions of one activation, or a dimension that they must not shard."""
        same_activation = (  # logical axes of different dimensions of one activation
            *itertools.combinations(("batch", "sequence", "block_sequence"), 2),
            *itertools.product(("batch", "sequence"), ("heads", "mlp", "vocab")),
        )
        for names in same_activation:
            axes = [axis for name in names for axis in getattr(self, name)]
            if twice := [axis for axis in axes if axes.count(axis) > 1]:
                message = f"mesh axis {twice[0]} shards two dimensions of one activation"
                yield Problem(fields=names, message=message, fix=f"keep {twice[0]} in one of them")
        reserved: tuple[tuple[MeshAxis, tuple[str, ...], str], ...] = (  # mesh axis, what it may shard, message
            ("stage", ("layers",), "mesh axis stage may shard only layers"),
            ("replica", ("batch", "sequence"), "mesh axis replica may shard only batch and sequence"),
        )
        for name in (field.name for field in fields(self)):
            for axis, allowed, message in reserved:
                if axis in getattr(self, name) and name not in allowed:
                    yield Problem(fields=(name,), message=message, fix=f"remove {axis} from {name}")
        if self.heads != self.kv_heads:
            message = "queries and keys of one head must be on one device"
            yield Problem(fields=("heads", "kv_heads"), message=message, fix="use the same mesh axes for both")
        if set(self.layers) - {"stage"}:  # the converse of what is reserved for stage above
            fix = "use rules.layers=stage or rules.layers=()"
            yield Problem(fields=("layers",), message="only mesh axis stage may shard layers", fix=fix)
        if {*self.experts} - {*self.batch}:
            shared = "".join(f"{axis}," for axis in self.experts if axis in self.batch)  # `expert,` makes a tuple
            message = "experts must use mesh axes of batch, whose devices exchange tokens"
            yield Problem(fields=("experts", "batch"), message=message, fix=f"use rules.experts=({shared})")

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes of a logical axis; "positions" stands for positions between blocks.

        The name of a mesh axis stands for itself.
        """
        if name in AXES:
            return (name,)
        return (*self.sequence, *self.block_sequence) if name == "positions" else getattr(self, name)
