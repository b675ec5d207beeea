"""The loss of a run as a function of its parameters and a batch, traced on whatever part of a batch it gets."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.errors import ConfigError
from jaxinfra.models.module import LayerStats, Module
from jaxinfra.objectives import losses
from jaxinfra.objectives.objective import Objective, WithReference
from jaxinfra.ops.dropout import DROPOUT_FIELD
from jaxinfra.ops.logits import with_unrolled_loops
from jaxinfra.ops.mtp import MTP_FIELDS
from jaxinfra.parallel.sharding import unit_cotangent
from jaxinfra.parallel.spec import Batch, Params, ParamSpecs, Sums, merge_trees, select_trainable
from jaxinfra.run import Run
from jaxinfra.user_code import user_code_errors

ROW_FIELD = "row"
"""The number of each row in its global batch, in a batch for `ModelLoss.reference_values`."""


class Forward:
    """The `objective.Apply` that an objective gets: applies the model, and collects the layers' statistics."""

    def __init__(self, loss: "ModelLoss", *, train: bool):
        self._loss, self._train, self.unroll_loops = loss, train, loss.unroll_loops
        # JAX can add partial sums, but not multiply them: only a loss whose class declares `partial_sums` gets them.
        self.partial_sums = adds_partial_sums(loss.run.objective)
        self.stats: LayerStats = {}

    def __call__(self, params: Params, batch: Batch, *, train: bool = True) -> Any:
        """Returns the output of the model for a batch."""
        train = train and self._train
        if not train:
            batch = {name: array for name, array in batch.items() if name not in (DROPOUT_FIELD, *MTP_FIELDS)}
        with user_code_errors(type(self._loss.run.model), "model"):
            output, stats = self._loss.model(params).forward(batch)
        output = with_unrolled_loops(output, self.unroll_loops)
        if train:  # an objective may call the model several times
            self.stats = jax.tree.map(jnp.add, self.stats, stats) if self.stats else stats
        return output


class ModelLoss:
    """The loss of a run's model.

    Attributes:
        run: the config.
        module: the model, with `ParamSpec`s in place of arrays.
        specs: `ParamSpec` of every parameter, a nested dict.
        unroll_loops: see `Partitioner`.
    """

    def __init__(self, run: Run, module: Module, graphdef: nnx.GraphDef[Any], specs: ParamSpecs, *, unroll_loops: bool):
        self.run, self.module, self.specs, self._graphdef = run, module, specs, graphdef
        self.unroll_loops = unroll_loops

    def model(self, params: Params) -> Module:
        """Returns the module with these parameters, for use while tracing."""
        return nnx.merge(self._graphdef, nnx.State(params))

    def __call__(
        self, params: Params, batch: Batch, reference: Params | None, *, train: bool
    ) -> tuple[jax.Array, tuple[Sums, LayerStats]]:
        """Returns the loss to minimize, summed over the batch, the objective's sums and the layers' statistics."""
        forward, objective = Forward(self, train=train), self.run.objective
        objective_params = _objective_params(params, reference)
        with user_code_errors(type(objective), "objective"):
            total, sums = losses.check_result(objective, objective.loss(forward, objective_params, batch))
        if train and self.run.mtp_depths and "mtp_loss" not in sums:
            name, fix = type(objective).__qualname__, "use objective.mtp_weight=0"
            raise ConfigError(
                f'{name}.loss: its sums have no "mtp_loss", so modules of model.mtp get no gradient; {fix}'
            )
        return losses.add_aux_loss(total, self.module.aux_loss(forward.stats)), (sums, forward.stats)

    def sums(self, params: Params, batch: Batch, reference: Params | None) -> Sums:
        """Returns the objective's sums over a batch without training."""
        return self(params, batch, reference, train=False)[1][0]

    def statistics(self, params: Params, batch: Batch, reference: Params | None) -> Sums:
        """Returns `Objective.statistics`."""
        return self.run.objective.statistics(Forward(self, train=False), _objective_params(params, reference), batch)

    def reference_values(self, params: Params, batch: Batch, reference: None) -> Sums:
        """Returns `Objective.reference_values` as sums: each row in its place of the global batch, zeros elsewhere."""
        values = self.run.objective.reference_values(Forward(self, train=False), params, batch)
        is_own_RB = batch[ROW_FIELD][:, None] == jnp.arange(self.run.train.global_batch)
        return {name: jnp.sum(jnp.where(is_own_RB, value[:, None], 0.0), axis=0) for name, value in values.items()}

    def with_gradients(self, params: Params, batch: Batch, reference: Params | None) -> tuple[Sums, LayerStats, Params]:
        """Returns sums, statistics and float32 gradients of a part of a batch, all partial sums over `replica`."""

        def loss(trained: Params) -> tuple[jax.Array, tuple[Sums, LayerStats]]:
            return self(merge_trees(params, trained), batch, reference, train=True)

        total, vjp, (sums, stats) = jax.vjp(loss, select_trainable(params, self.specs), has_aux=True)
        # Not `value_and_grad`, whose cotangent 1 is not *reduced*: that of an unreduced total must be.
        (grads,) = vjp(unit_cotangent(total))
        return sums, stats, jax.tree.map(lambda g: g.astype(jnp.float32), grads)


def _objective_params(params: Params, reference: Params | None) -> Params | WithReference:
    # The reference may have the trained parameters alone.
    return params if reference is None else WithReference(params, merge_trees(params, reference))


def adds_partial_sums(objective: Objective) -> bool:
    """Whether an objective takes partial sums; a subclass that overrides its loss must say so again."""
    return bool(vars(type(objective)).get("partial_sums", False))
