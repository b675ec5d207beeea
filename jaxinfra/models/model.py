"""The base class of model configs: what is known about a model before it is built. Imports no JAX."""

import pkgutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from jaxinfra.config import Extensible, Problem
from jaxinfra.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfra.models.module import Module


class ModelConfig(Extensible):
    """A model: a frozen dataclass that inherits from this class.

    It defines `build`, or names as its `implementation` a class that takes `(config, partitioner)`. The result is a
    `models.module.Module`; pipeline stages need its subclass `LayeredModule`.

    Attributes:
        modality: what the model reads, such as "token" or "image"; None for a model that reads any data.
        implementation: the class that `build` instantiates, as "package.module:Class".
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
            name = type(self).__name__
            raise ConfigError(f"{name}: defines neither build nor implementation; add def build(self, partitioner)")
        return pkgutil.resolve_name(self.implementation)(self, partitioner)

    @property
    def pipeline_layers(self) -> int:
        """Number of layers to split over pipeline stages; 0 for a model that cannot be split."""
        return 0

    @property
    def uses_dropout(self) -> bool:
        """Whether training draws random numbers: batches then have `ops.dropout.DROPOUT_FIELD`, `[B, positions]`."""
        return False

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Config fields that set the size of a sharded dimension: field name to (size, logical axis)."""
        return {}

    def positions(self, data: Any) -> int:
        """Returns the number of positions in the activations of one sample."""
        return 1

    def problems_with(self, data: Any) -> Iterable[Problem]:
        """Yields conflicts between the model and the data config; field paths start at the run."""
        return ()
