"""The base classes of built models: `Module`, and `LayeredModule` for models that pipeline stages can split.

A module is built without arrays: its parameters hold `ParamSpec`s. `Program` splits it once with `nnx.split`, and
merges arrays in when it traces a step. A module is never changed.

Methods that a subclass must define raise NotImplementedError, since Flax modules cannot be abstract base classes: they
have a metaclass of their own.

Shape suffixes: B batch, T positions, D residual width, L layers, S pipeline stages.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, override

import jax
import numpy as np
from flax import nnx

from jaxinfra.ops.context_cost import ContextChoice
from jaxinfra.parallel.spec import Params, ParamSpec

type Inputs = Mapping[str, jax.Array]
type LayerStats = dict[str, jax.Array]
"""Statistics of the layers by name: sums over the batch, unreduced (each device has a partial sum)."""


class Module(nnx.Module):
    """A model. A subclass must define `__call__`; all other methods have defaults.

    Attributes:
        partial_gradients: whether the gradients of parameters may be partial sums on each device, which the train step
            adds up once at its end.
    """

    partial_gradients: ClassVar[bool] = True

    def __call__(self, batch: Inputs, /) -> Any:
        """Returns the input of the objective: logits `[B, ...]`, or `ops.logits.FactoredLogits`."""
        raise NotImplementedError

    def forward(self, batch: Inputs, /) -> tuple[Any, LayerStats]:
        """Returns the result of `__call__` and the statistics of the layers."""
        return self(batch), {}

    def aux_loss(self, stats: LayerStats) -> jax.Array | None:
        """Returns the auxiliary loss from the statistics, summed over the batch; None if there is none."""
        return None

    def metrics(self, stats: LayerStats, weight: jax.Array) -> dict[str, jax.Array]:
        """Returns scalars to log; `weight` is the objective's sum of weights over the batch."""
        return {}

    def update_buffers(self, stats: LayerStats) -> dict[str, Any]:
        """Returns the new values of buffers after a step: a nested dict like the parameters, with only the buffers."""
        return {}

    def init_params(self, key: jax.Array, shardings: Any) -> Params | None:
        """Initializes all parameters in these shardings; None initializes each one by its `ParamSpec`."""
        return None

    def flops(self, data: Any) -> float | None:
        """Returns the FLOPs of training on one sample; None estimates `6 * parameters * units_per_sample`."""
        return None

    def flops_of_changes(self, data: Any, specs: Mapping[str, ParamSpec], base: Mapping[str, ParamSpec]) -> float:
        """Returns the FLOPs of one sample beyond `flops`, for a run with adapters or frozen weights.

        `specs` are the parameters of the run by path, `base` those of its model alone.
        """
        return 0.0

    def context_costs(self, data: Any) -> Mapping[str, ContextChoice]:
        """Returns the method of context parallelism for each layer type; {} if sequences are not sharded."""
        return {}


class StageLayers(NamedTuple):
    """The layers that the stages of a pipeline apply in one call.

    Attributes:
        indices: indices into the stacked layers, `[L, S]` for L layers on each of S stages; -1 is padding, with weights
            of zeros.
        uniform: whether all stages apply the same type of layer at the same time (see `LayeredModule.uniform`).
    """

    indices: jax.Array
    uniform: bool


class LayeredModule(Module):
    """A model with stacked layers, which pipeline stages can split.

    Attributes:
        blocks: the stacked parameters of the layers. In a pipeline they are those of one chunk of layers.
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
        """Returns the activations after the layers in `blocks`, and their statistics, one row per layer.

        `stage_layers` is given in a pipeline, where `blocks` are those of one chunk of each stage.
        """
        raise NotImplementedError

    def output(self, x: jax.Array, /) -> Any:
        """Returns the output of the model, given the activations after the last layer."""
        raise NotImplementedError

    def uniform(self, layers: np.ndarray) -> bool:
        """Returns whether all stages apply the same type of layer at the same time, so that none needs a branch.

        `layers` are the layers' indices, `[chunks, layers of a chunk, stages]`; -1 is padding.
        """
        raise NotImplementedError
