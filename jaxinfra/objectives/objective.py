"""The base class of objectives, which define one function: `loss`. Imports no JAX."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from jaxinfra.config import Extensible, Problem

if TYPE_CHECKING:
    import jax

type Batch = Mapping[str, jax.Array]
type Params = dict[str, Any]
"""A nested dict of arrays."""


class Apply(Protocol):
    """The model as an objective calls it.

    Attributes:
        partial_sums: whether `Objective.loss` may return unreduced sums: each device holds a partial sum, and the
            train step all-reduces them once.
        unroll_loops: what to pass as `unroll` to a `jax.lax.scan` whose steps communicate between devices.
    """

    partial_sums: bool
    unroll_loops: bool

    def __call__(self, params: Params, batch: Batch, *, train: bool = True) -> Any:
        """Returns the output of the model for a batch.

        Language models return `ops.logits.FactoredLogits`, classifiers float32 logits `[B, C]`. With `train=False`
        dropout is off, and the call does not update buffers.
        """
        ...


class WithReference(NamedTuple):
    """The `params` of an objective with `uses_reference`."""

    trained: Params
    reference: Params


class Objective(Extensible, ABC):
    """The function that a run minimizes. Yours is a frozen dataclass that inherits from it and defines `loss`.

    Attributes:
        batch_fields: names of arrays that the batch must have.
        by_position: whether the loss is a sum over positions in any order. Then context parallelism may reorder
            positions to balance causal attention, and pipeline stages may split the positions for the loss.
        uses_reference: whether `params` is a `WithReference`, with a frozen copy of the parameters that the run
            started from, which `Run.init` names.
        reference_fields: names of the arrays that `reference_values` returns. If the data has them, `params` are the
            trained parameters alone, and the batch has what the reference gave once. Each costs a forward pass on one
            sequence.
        statistics_fields: names of the sums that `statistics` returns.
        makes_rows: whether `loss` makes the rows that it calls the model with, which pipeline stages do not allow.
        partial_sums: whether `loss` can return partial sums, which it does if `apply.partial_sums` is true: fewer
            collectives. Each class must declare it itself, since a subclass may override `loss` without support for it.
    """

    builtins: ClassVar[tuple[str, ...]] = (
        "jaxinfra.objectives.causal_lm:CausalLM",
        "jaxinfra.objectives.classification:Classification",
        "jaxinfra.objectives.dpo:DPO",
        "jaxinfra.objectives.orpo:ORPO",
        "jaxinfra.objectives.kto:KTO",
    )
    batch_fields: ClassVar[tuple[str, ...]] = ()
    by_position: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = False
    reference_fields: ClassVar[tuple[str, ...]] = ()
    statistics_fields: ClassVar[tuple[str, ...]] = ()
    makes_rows: ClassVar[bool] = False
    partial_sums: ClassVar[bool] = False

    @property
    def trains_mtp(self) -> bool:
        """Whether `loss` adds that of modules for multi-token prediction (`mtp_hidden` of the model's logits).

        Others leave these modules as they are, and they are not computed.
        """
        return False

    @abstractmethod
    def loss(self, apply: Apply, params: Any, batch: Batch) -> "tuple[jax.Array, dict[str, jax.Array]]":
        """Returns the loss to minimize, summed over the batch, and other sums by name, all float32 scalars.

        Nothing is divided here: the train step divides the gradient, and every sum that is logged, by `sums["weight"]`,
        such as the number of targets. `sums["loss"]` is the loss to report, by default the one to minimize. A batch may
        have `weights`: they are 0 for samples that pad the last batch of an evaluation.
        """

    def reference_values(self, apply: Apply, params: Params, batch: Batch) -> "dict[str, jax.Array]":
        """Returns the `reference_fields` of each sample, float32 `[B]`, given the parameters of the reference.

        A class that names such fields must define it; it is not called for others.
        """
        raise NotImplementedError

    def statistics(self, apply: Apply, params: Any, batch: Batch) -> "dict[str, jax.Array]":
        """Returns the `statistics_fields`: sums over the batch, of which `loss` needs those of the whole global batch.

        `loss` may get a part of the global batch, whose rows all have these sums as fields, float32 `[B]`. A class that
        names such fields must define it; it is not called for others.
        """
        raise NotImplementedError

    def flops(self, model_flops: float) -> float:
        """Returns the FLOPs of training on one sample, without those of `reference_values`.

        `model_flops` are those of the model, forward and backward, on one sequence or image.
        """
        return model_flops

    def problems_with(self, data: Any) -> Iterable[Problem]:
        """Yields conflicts between the objective and the data config; fields are named as in `data.seq_len`."""
        return ()

    def problems_of_shard(self, positions: int) -> Iterable[Problem]:
        """Yields conflicts with the number of positions of a sequence that one device has, if they are sharded.

        Fields are named as in `problems_with`.
        """
        return ()

    def evaluation_metrics(self, sums: Mapping[str, float], samples: Any) -> dict[str, float]:
        """Returns the metrics of an evaluation, `loss` first, from the sums over all validation samples.

        `samples` are those of the data, a `data.interfaces.Samples`.
        """
        return {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}
