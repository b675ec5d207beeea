"""What a model family offers to everything outside `models/`: a config that describes it, and the module it builds.

A model is a stream of activations that passes a stack of like layers. Nothing else is known of it: pipelines, the
train step and `show` work with any that keeps to this.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from jaxinfra.config import Problem
from jaxinfra.ops.context_cost import ContextChoice
from jaxinfra.parallel.sharding import Partitioner

type Inputs = Mapping[str, jax.Array]
type LayerStats = dict[str, jax.Array]
"""What layers count, by name: sums over the batch, unreduced over the axes that it is spread over."""


class ModelConfig(Protocol):
    """The shape of a model.

    Attributes:
        modality: what it reads, and what speed is counted in: "token" or "image".
    """

    modality: ClassVar[str]

    @property
    def layers(self) -> int:
        """Layers of the stack."""
        ...

    @property
    def width(self) -> int:
        """Width of the stream."""
        ...

    @property
    def dropout(self) -> float:
        """Part of the features that layers drop while training; above 0 batches have `ops.dropout.DROPOUT_FIELD`."""
        ...

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Fields whose dimensions are sharded: the size, and the logical axis (see `Partitioner.mesh_axes`)."""
        ...

    def problems_with(self, data: Any) -> Iterable[Problem]:
        """What is wrong between the model and the data, with whole paths (`model.x`, `data.y`)."""
        ...

    def positions(self, data: Any) -> int:
        """Positions of the stream of one sample."""
        ...

    def flops(self, data: Any) -> float:
        """FLOPs of forward and backward pass of one sample, in training (see `models.flops`)."""
        ...

    def across(self, data: Any, partitioner: Partitioner) -> Mapping[str, ContextChoice]:
        """How attention reaches the other shards of a sequence, by kind of layer; nothing where sequences are whole."""
        ...

    def uniform(self, numbers: np.ndarray) -> bool:
        """Whether the layers that stand side by side in pipeline stages all are of one kind.

        The numbers of layers are `[chunks, layers of a chunk, stages]`; -1 for none.
        """
        ...

    def build(self, partitioner: Partitioner) -> nnx.Module:
        """The module (see `Model`), with `ParamSpec`s where arrays will be."""
        ...


class StageLayers(NamedTuple):
    """Which layers the blocks of a call are, in a pipeline.

    Attributes:
        numbers: `[L, S]`, those of each of S stages; -1 for none.
        uniform: whether the layers that stand side by side in the stages are all of one kind.
    """

    numbers: jax.Array
    uniform: bool


class Model(Protocol):
    """What a model offers to tasks and pipelines.

    `blocks` holds the parameters of the layers, stacked; a model that is merged with the parameters of some layers
    alone has those. What a task needs at the end of the stream is between the task and its models.
    """

    blocks: nnx.Module

    def embed(self, batch: Inputs) -> jax.Array:
        """The stream before the first layer, `[B, T, D]`."""
        ...

    def apply_layers(
        self, x: jax.Array, batch: Inputs, staged: StageLayers | None = None, /
    ) -> tuple[jax.Array, LayerStats]:
        """The stream after the layers in `blocks`, and what they count, one row a layer."""
        ...

    def aux_loss(self, stats: LayerStats) -> jax.Array | None:
        """What layers add to the loss, from what they count, summed over the batch like it; None for nothing."""
        ...

    def metrics(self, stats: LayerStats, weight: jax.Array) -> dict[str, jax.Array]:
        """Scalars to log, from what all layers counted in a step, and the weight of its batch."""
        ...

    def update_buffers(self, stats: LayerStats) -> dict[str, Any]:
        """The parameters that are not trained, as they are after a step, from what all layers counted in it.

        They come as a nested dict of their own (see `parallel.spec.merge_trees`).
        """
        ...
