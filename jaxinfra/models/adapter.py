"""The config of an adapter: small matrices that are trained beside the frozen weights of a model. Imports no JAX."""

from dataclasses import dataclass
from typing import ClassVar

from jaxinfra.config.limits import PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adds `alpha / rank * a @ b` to weights, which stay as they are (Hu et al. 2021, "LoRA").

    Attributes:
        rank: columns of `a` and rows of `b`.
        alpha: scale of what is added, times the rank; PEFT's `lora_alpha`.
        targets: the weights: parts of their paths, such as "query" or "attention", or patterns of whole paths, such as
            "blocks.*.up". The router of experts and the embedding have no adapters.
        trained: other parameters, which are trained as they are: their paths, or patterns of them, such as "embedding".
            The checkpoint has them, too.
        dora: trains the magnitude of each output feature apart from its direction (Liu et al. 2024, "DoRA"); experts
            cannot have it.
    """

    any_rank: ClassVar[bool] = False  # whether the rank may be above the dimensions of a weight

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: tuple[str, ...] = ("attention", "mlp")
    trained: tuple[str, ...] = ()
    dora: bool = False
