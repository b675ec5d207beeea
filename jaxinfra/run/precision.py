"""The number formats of a run."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.packages import install_command
from jaxinfra.parallel.rules import Packed, Quantize


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats.

    Attributes:
        params: dtype in which parameters are stored.
        frozen: dtype in which the weights beside an adapter are stored; None is `params`. "int8" and "nf4" are for the
            layers' matmuls (see `ops.packed`): other parameters have `compute` then.
        compute: dtype of weights and activations in the model; losses, norms and sums are float32.
        quantize: format of the operands of the layers' matmuls with weights (see `ops.quantized`); embedding and head
            are not quantized.
    """

    params: Literal["float32", "bfloat16"] = "float32"
    frozen: Literal["float32", "bfloat16"] | Packed | None = None
    compute: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Quantize = "none"

    @property
    def packed(self) -> Packed | None:
        """The format of frozen weights that are stored in fewer bits; None if they are not."""
        return self.frozen if self.frozen in ("int8", "nf4") else None

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if `quantize` is set without its package, or with packed weights."""
        if self.quantize != "none" and self.packed is not None:
            message = "packed weights are multiplied in the compute dtype"
            yield Problem(fields=("quantize", "frozen"), message=message, fix="use quantize=none")
        if self.quantize != "none" and find_spec("qwix") is None:
            message = "quantized matmuls need the package qwix, which is not installed"
            yield Problem(fields=("quantize",), message=message, fix=f"run {install_command('jaxinfra[quantized]')}")
