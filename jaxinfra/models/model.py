"""The base classes of model configs: what is known about a model before it is built. Imports no JAX."""

import pkgutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, override

from jaxinfra.config import Extensible, Problem, leaves
from jaxinfra.config.overrides import apply
from jaxinfra.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfra.models.module import Module


class ModelConfig(Extensible):
    """A model. Yours is a frozen dataclass that inherits from this class and defines `build`.

    Attributes:
        builtins: import paths of the models that have short names (see `Extensible`).
        modality: what the model reads, such as "token" or "image"; None for a model that reads any data.
        implementation: in place of `build`: "package.module:Class", where the class takes `(config, partitioner)`.
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
        """Returns the module, with a `ParamSpec` in place of every array; pipeline stages need a `LayeredModule`."""
        if self.implementation is None:
            name = type(self).__name__
            raise ConfigError(f"{name}: defines neither build nor implementation; add def build(self, partitioner)")
        return pkgutil.resolve_name(self.implementation)(self, partitioner)

    @property
    def pipeline_periods(self) -> int:
        """Number of periods, each of one or more layers, that stages split; 0 for a model that cannot be split."""
        return 0

    def problems_of_stages(self, chunks: int) -> Iterable[Problem]:
        """Yields conflicts with a pipeline of this number of chunks on all stages; fields are as in `mesh.stage`."""
        return ()

    @property
    def uses_dropout(self) -> bool:
        """Whether training draws random numbers: batches then have the field "dropout" (see `ops.dropout`)."""
        return False

    @property
    def mtp_depths(self) -> int:
        """Number of modules that predict tokens beyond the next one (see `ops.mtp`)."""
        return 0

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Config fields whose value must divide by the mesh axes that shard it: `{"mlp_dim": (4096, "mlp")}`.

        Maps the name of a field to the size of the dimension and its logical axis.
        """
        return {}

    def with_width(self, width: int) -> Self:
        """Returns the model with another `hidden_size`, and with MLPs and heads in proportion: wider heads, or more."""
        values, sizes = leaves(self), {"hidden_size": width}
        for path, (size, axis) in self.sharded_dims.items():
            is_wider = values.get(f"{path.rpartition('.')[0]}.head_dim", 0) is None
            if axis in (("embed", "mlp") if is_wider else ("embed", "mlp", "heads", "kv_heads")):
                sizes.setdefault(path, max(1, round(size * width / int(str(values["hidden_size"])))))
        return apply(self, [f"{path}={size}" for path, size in sizes.items()])

    def in_mup(self, ratio: float) -> Self:
        """Returns the model with the factors on activations of muP, at `ratio` times the base width."""
        return self

    def positions(self, data: Any) -> int:
        """Returns the number of positions in the activations of one sample."""
        return 1

    def problems_with(self, data: Any) -> Iterable[Problem]:
        """Yields conflicts between the model and the data config; fields are named as in `data.seq_len`."""
        return ()


class LayeredModelConfig(ModelConfig):
    """A model whose layers pipeline stages can split. Subclasses declare its two attributes as fields."""

    num_layers: int
    dropout: float  # rate

    @property
    @override
    def pipeline_periods(self) -> int:
        return self.num_layers

    @property
    @override
    def uses_dropout(self) -> bool:
        return self.dropout > 0

    @override
    def problems_of_stages(self, chunks: int) -> Iterable[Problem]:
        if self.num_layers < chunks:
            yield Problem(
                fields=("model.num_layers", "mesh.stage", "pipeline.chunks"),
                message=f"fewer layers than chunks ({chunks} on all stages)",
                fix=f"use model.num_layers={chunks} or fewer stages",
            )
