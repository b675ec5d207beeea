"""The base class of objectives. An objective is one function, `loss`. Imports no JAX."""

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
        partial_sums: whether `Objective.loss` may return sums that are not yet added up over the mesh.
    """

    partial_sums: bool

    def __call__(self, params: Params, batch: Batch, *, train: bool = True) -> Any:
        """Returns what the model makes of a batch: logits, for the models of this package.

        Language models return `ops.logits.FactoredLogits`, classifiers float32 `[B, C]`. With `train=False` dropout is
        off and nothing the model updates by itself changes.
        """
        ...


class WithReference(NamedTuple):
    """The parameters that an objective with `uses_reference` gets."""

    trained: Params
    reference: Params


class Objective(Extensible, ABC):
    """What a run minimizes: a frozen dataclass that inherits from this class and defines `loss`.

    Attributes:
        batch_fields: arrays that the batch must have.
        by_position: whether each position of a sequence adds to the loss by itself. If so, context parallelism may
            reorder positions to balance causal attention, and pipeline stages may share a sequence for the loss.
        uses_reference: whether `params` is a `WithReference`, whose frozen copy starts as `Run.init` does.
        partial_sums: whether `loss` returns partial sums where `apply.partial_sums` says so: fewer collectives. It is
            not inherited: a subclass with a `loss` of its own need not know of it.
    """

    builtins: ClassVar[tuple[str, ...]] = (
        "jaxinfra.objectives.causal_lm:CausalLM",
        "jaxinfra.objectives.classification:Classification",
        "jaxinfra.objectives.dpo:DPO",
    )
    batch_fields: ClassVar[tuple[str, ...]] = ()
    by_position: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = False
    partial_sums: ClassVar[bool] = False

    @abstractmethod
    def loss(self, apply: Apply, params: Any, batch: Batch) -> "tuple[jax.Array, dict[str, jax.Array]]":
        """Returns the loss to minimize, summed over the batch, and other sums by name, all float32 scalars.

        `sums["weight"]` is what the loss is divided by, such as the number of targets; so are all other sums when they
        are logged. `sums["loss"]` is the loss to report, if it is not the one to minimize. A batch may have `weights`,
        which are 0 for samples that fill up the last batch of an evaluation.
        """

    def flops(self, per_sequence: float) -> float:
        """Returns the FLOPs of training on one sample, from the model's for training on one sequence or image."""
        return per_sequence

    def problems_with(self, data: Any) -> Iterable[Problem]:
        """Yields what does not fit between the objective and the data config, with paths from the run."""
        return ()

    def problems_of_shard(self, positions: int) -> Iterable[Problem]:
        """Yields what does not fit the positions of a sequence that one device has, with paths from the run."""
        return ()

    def scores(self, sums: Mapping[str, float], samples: Any) -> dict[str, float]:
        """Returns the metrics of an evaluation from sums over all validation samples: means, `loss` first."""
        return {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}
