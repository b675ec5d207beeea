"""The base class of model configs: what a run knows of a model before it is built. Imports no JAX."""

import pkgutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from jaxinfra.config import Extensible, Problem

if TYPE_CHECKING:
    from jaxinfra.models.module import Module


class ModelConfig(Extensible):
    """A model: a frozen dataclass that inherits from this class.

    It defines `build`, or names a class that takes `(config, partitioner)` as its `implementation`. What is built is a
    `models.module.Module`, or for pipeline stages a `LayeredModule`.

    Attributes:
        modality: what the model reads, such as "token" or "image"; None for a model that reads any data.
        implementation: the class that `build` makes, as "package.module:Class".
        supports_context: whether sequences may be sharded over the context axis.
    """

    builtins: ClassVar[tuple[str, ...]] = (
        "jaxinfra.models.transformer:TransformerConfig",
        "jaxinfra.models.vit:VisionTransformerConfig",
    )
    modality: ClassVar[str | None] = None
    implementation: ClassVar[str | None] = None
    supports_context: ClassVar[bool] = False

    def build(self, partitioner: Any) -> "Module":
        """Returns the module, with a `ParamSpec` in place of every array."""
        if self.implementation is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither build nor implementation")
        return pkgutil.resolve_name(self.implementation)(self, partitioner)

    @property
    def pipeline_layers(self) -> int:
        """Number of layers that pipeline stages may share; 0 for a model that cannot be cut into stages."""
        return 0

    @property
    def uses_dropout(self) -> bool:
        """Whether training draws random numbers: batches then have `ops.dropout.DROPOUT_FIELD`, `[B, positions]`."""
        return False

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Config fields that are the size of a sharded dimension: the size, and its logical axis."""
        return {}

    def positions(self, data: Any) -> int:
        """Returns the positions of the activations of one sample."""
        return 1

    def problems_with(self, data: Any) -> Iterable[Problem]:
        """Yields what does not fit between the model and the data config, with paths from the run."""
        return ()
