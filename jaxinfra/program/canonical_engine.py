"""Computes gradients whose bits do not depend on the mesh (`train.canonical`), by `parallel.canonical`."""

from functools import partial
from typing import override

import jax
from jax.sharding import PartitionSpec

from jaxinfra.models.module import LayerStats
from jaxinfra.parallel.canonical import VirtualShards
from jaxinfra.parallel.rounding import rounded, unknown_zero, with_rounded_products
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import Params, PyTree, select_trainable
from jaxinfra.program.engine import Function, GradientEngine, Gradients
from jaxinfra.program.loss import Batch, ModelLoss, Sums

type Weights = tuple[Params, Params | None]
"""Parameters, and the reference of an objective that uses one: frozen parameters, as in DPO."""


class CanonicalEngine(GradientEngine):
    """Each device computes virtual shards of a batch by itself; all are added up in an order that no mesh changes.

    Attributes:
        virtual_shards: how a batch is split, and the sums over its parts.

    `with_digests` says whether gradients have digests.
    """

    def __init__(
        self, loss: ModelLoss, partitioner: Partitioner, stored: PyTree, *, with_digests: bool = False
    ) -> None:
        super().__init__(loss, partitioner, stored)
        self._with_digests = with_digests
        assert loss.run.train.canonical is not None
        self.virtual_shards = VirtualShards(count=loss.run.train.canonical, mesh=partitioner.mesh)

    @property
    @override
    def num_row_shards(self) -> int:
        return self.virtual_shards.devices

    @override
    def batch_spec(self, *names: str | None) -> PartitionSpec:
        return self.virtual_shards.rows

    @override
    def make_params(self, make: Function, key: jax.Array) -> Params:
        whole = jax.tree.map(lambda _: PartitionSpec(), self.stored)
        return self.virtual_shards.make(lambda key: make(key, whole), key, self.stored)

    @override
    def gradients(self, params: Params, batch: Batch, reference: Params | None) -> Gradients:
        def of_one(weights: Weights, batch: Batch) -> tuple[tuple[Sums, LayerStats], Params]:
            sums, stats, grads = self.loss.with_gradients(weights[0], batch, weights[1])
            return (sums, stats), grads

        (sums, stats), grads, digests = self.virtual_shards.gradients(
            of_one,
            (params, reference),
            self._stored_as(reference),
            batch,
            select_trainable(self.stored, self.specs),
            with_digests=self._with_digests,
        )
        return Gradients(grads, sums, stats, digests)

    @override
    def sums(self, params: Params, batch: Batch, reference: Params | None, of: Function) -> Sums:
        def of_one(weights: Weights, batch: Batch) -> Sums:
            return of(weights[0], batch, weights[1])

        return self.virtual_shards.sums(of_one, (params, reference), self._stored_as(reference), batch)

    @override
    def mean(self, grads: Params, weight: jax.Array) -> Params:
        grads, zero = super().mean(grads, weight), unknown_zero(weight)
        return jax.tree.map(lambda g: rounded(g, zero), grads)

    @override
    def with_exact_rounding(self, clip: Function, update: Function, grads: Params) -> tuple[Function, Function]:
        square_sum = self.virtual_shards.square_sum(grads, select_trainable(self.stored, self.specs))
        clip = partial(clip, square_sum=square_sum)
        clip, update = (
            with_rounded_products(each, unknown_zero(square_sum), "optim.optimizer") for each in (clip, update)
        )
        return clip, update

    def _stored_as(self, reference: Params | None) -> tuple[PyTree, PyTree]:
        """Returns the `PartitionSpec`s of `Weights`."""
        return self.stored, None if reference is None else self.stored
