"""Sharding rules: which mesh axes each logical axis of an array is sharded over. Imports no JAX."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.parallel.mesh_config import MeshAxis

type LogicalAxes = tuple[str | None, ...]
type Quantize = Literal["none", "int8", "fp8"]
"""The format of the factors of products with the weights of layers (see `ops.quantized`)."""


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Which mesh axes each logical axis is spread over; `()` keeps it whole on every device.

    Attributes:
        batch: sequences of a batch.
        sequence: positions of a sequence, everywhere.
        block_sequence: positions, in addition, between blocks: the residual stream of sequence parallelism.
        layers: stacked layers.
        embed: the residual width, or the rank of a product of two, of parameters alone: activations keep it whole.
            Parameters of experts leave out the axes of `experts`.
        heads: attention heads.
        kv_heads: heads of keys and values.
        mlp: hidden width of the MLP, and of each expert.
        experts: experts, which tokens are sent to; of the axes of `batch`.
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
        """Each mesh axis spreads one dimension of an activation, and what it is for; heads must agree."""
        spread = (*self.batch, *self.sequence, *self.block_sequence)
        twice = sorted({axis for axis in spread if spread.count(axis) > 1})
        if twice:
            yield Problem(
                fields=("batch", "sequence", "block_sequence"),
                message=f"{twice[0]} shards two dimensions of one activation",
                fix=f"keep {twice[0]} in one of them",
            )
        reserved: tuple[tuple[MeshAxis, tuple[str, ...], str], ...] = (
            ("stage", ("layers",), "stages share out layers and nothing else"),
            ("replica", ("batch", "sequence"), "replicas have the whole model, and rows or positions of their own"),
        )
        for name, (axis, its_own, message) in itertools.product((field.name for field in fields(self)), reserved):
            if axis in getattr(self, name) and name not in its_own:
                yield Problem(fields=(name,), message=message, fix=f"take {axis} from {name}")
        if self.heads != self.kv_heads:
            yield Problem(
                fields=("heads", "kv_heads"),
                message="queries and keys of one head must live on one device",
                fix="give both the same mesh axes",
            )
        if set(self.layers) - {"stage"}:
            yield Problem(
                fields=("layers",),
                message="layers are scanned on every device, or shared out to pipeline stages",
                fix="use rules.layers=stage or rules.layers=()",
            )
        if {*self.experts} - {*self.batch}:
            shared = "".join(f"{axis}," for axis in self.experts if axis in self.batch)
            yield Problem(
                fields=("experts", "batch"),
                message="tokens are sent to experts from the devices that share the batch",
                fix=f"use rules.experts=({shared})",
            )
        for names in itertools.product(("batch", "sequence"), ("heads", "mlp", "vocab")):
            tokens, features = (getattr(self, name) for name in names)
            if both := [axis for axis in tokens if axis in features]:
                message = f"{both[0]} shards two dimensions of one activation"
                yield Problem(fields=names, message=message, fix=f"keep {both[0]} in one of them")

    def mesh_axes(self, name: str) -> tuple[MeshAxis, ...]:
        """The mesh axes of a logical axis; "positions" are those of a sequence between blocks."""
        return (*self.sequence, *self.block_sequence) if name == "positions" else getattr(self, name)
