"""The number formats of a run."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.packages import install_command
from jaxinfra.parallel.rules import Quantize


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats.

    Attributes:
        params: dtype in which parameters are stored.
        compute: dtype of weights and activations in the model; losses, norms and sums are float32.
        quantize: format of the operands of the layers' matmuls with weights (see `ops.quantized`); embedding and head
            are not quantized.
    """

    params: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Quantize = "none"

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if `quantize` is set without its package."""
        if self.quantize != "none" and find_spec("qwix") is None:
            message = "quantized matmuls need the package qwix, which is not installed"
            yield Problem(fields=("quantize",), message=message, fix=f"run {install_command('jaxinfra[quantized]')}")
