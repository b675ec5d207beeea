"""What a model is once it is built: a module that is called in a train step, and how its layers are reached one by one.

A module is built without arrays: its parameters hold `ParamSpec`s. `Program` splits it once, and merges arrays in where
a step is traced; a module is never changed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, override

import jax
import numpy as np
from flax import nnx

from jaxinfra.parallel.spec import Params

if TYPE_CHECKING:
    from jaxinfra.ops.context_cost import ContextChoice

type Inputs = Mapping[str, jax.Array]
type LayerStats = dict[str, jax.Array]
"""Statistics of the layers, by name: sums over the batch, partial (unreduced) over the axes that shard it."""


class Module(nnx.Module):
    """A model of one call. Only `__call__` must be defined.

    Attributes:
        partial_gradients: whether parameters may be marked as reduced over mesh axes, so that their gradients are
            partial sums until the end of a step.
    """

    partial_gradients: ClassVar[bool] = True

    def __call__(self, batch: Inputs, /) -> Any:
        """Returns what objectives work on: logits `[B, ...]`, or `ops.logits.FactoredLogits`."""
        raise NotImplementedError

    def forward(self, batch: Inputs, /) -> tuple[Any, LayerStats]:
        """Returns the result of the call and the statistics of the layers."""
        return self(batch), {}

    def aux_loss(self, stats: LayerStats) -> jax.Array | None:
        """Returns what the statistics add to the loss, summed over the batch like it; None for nothing."""
        return None

    def metrics(self, stats: LayerStats, weight: jax.Array) -> dict[str, jax.Array]:
        """Returns scalars to log, from the statistics of a step and the weight of its batch."""
        return {}

    def update_buffers(self, stats: LayerStats) -> dict[str, Any]:
        """Returns the parameters that the model updates itself, as they are after a step: a part of the nested dict."""
        return {}

    def init_params(self, key: jax.Array, shardings: Any) -> Params | None:
        """Returns the first values of all parameters in these shardings; None to draw each as its `ParamSpec` says."""
        return None

    def flops(self, data: Any) -> float | None:
        """Returns the FLOPs of training on one sample; None for `6 * parameters * units_per_sample`."""
        return None

    def context_costs(self, data: Any) -> "Mapping[str, ContextChoice]":
        """Returns how each type of layer attends over the shards of a sequence; nothing where sequences are whole."""
        return {}


class StageLayers(NamedTuple):
    """Which layers a call applies, in a pipeline.

    Attributes:
        numbers: `[L, S]`, the layer numbers of each of S stages; -1 for none.
        uniform: whether the layers that stand side by side in the stages are all of one type.
    """

    numbers: jax.Array
    uniform: bool


class LayeredModule(Module):
    """A model whose layers are stacked, so that pipeline stages can share them.

    Attributes:
        blocks: the parameters of the layers, stacked; a module merged with those of some layers applies these alone.
    """

    blocks: Any

    @override
    def __call__(self, batch: Inputs, /) -> Any:
        return self.forward(batch)[0]

    @override
    def forward(self, batch: Inputs, /) -> tuple[Any, LayerStats]:
        x, stats = self.apply_layers(self.embed(batch), batch)
        return self.output(x), stats

    def embed(self, batch: Inputs, /) -> jax.Array:
        """Returns the activations before the first layer, `[B, T, D]`."""
        raise NotImplementedError

    def apply_layers(
        self, x: jax.Array, batch: Inputs, stage_layers: StageLayers | None = None, /
    ) -> tuple[jax.Array, LayerStats]:
        """Returns the activations after the layers in `blocks`, and their statistics, one row a layer."""
        raise NotImplementedError

    def output(self, x: jax.Array, /) -> Any:
        """Returns what the call returns, from the activations after the last layer."""
        raise NotImplementedError

    def uniform(self, numbers: np.ndarray) -> bool:
        """Whether the layers that stand side by side in pipeline stages are all of one type.

        `numbers` `[chunks, layers of a chunk, stages]` are those of the layers; -1 for none.
        """
        raise NotImplementedError
