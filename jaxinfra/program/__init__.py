"""The compiled functions of a run: `Program`, and the engines that compute its gradients."""

from jaxinfra.program.loss import Batch, Sums
from jaxinfra.program.program import Metrics, Program, TrainState

__all__ = ["Batch", "Metrics", "Program", "Sums", "TrainState"]
