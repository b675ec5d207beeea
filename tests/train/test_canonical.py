"""A run in canonical mode goes on bit for bit with other devices and other processes."""

from jaxinfra.bench import merge_overrides
from jaxinfra.config import validate
from tests.refusals import mended, problem
from tests.tiny_run import Tiny


def test_what_cannot_be_honored_is_refused(tiny: Tiny) -> None:
    """Each line suggests overrides that do."""
    for wrong, *named in (
        ("train.canonical=6", "train.canonical=6"),
        ("train.accumulate=2", "train.accumulate=2 train.canonical=8"),
        ("train.global_batch=12", "train.global_batch=12"),
        ("mesh.replica=2", "16 train.canonical=8"),
        ("mesh.replica=3", "24 train.canonical=8"),
        ("optim.optimizer=muon", "optim.optimizer"),
        ("optim.optimizer=adafactor", "optim.optimizer"),
        ("optim.offload=true", "optim.offload"),
    ):
        overrides = merge_overrides(["mesh.fsdp=8", "train.global_batch=48", "train.canonical=8", wrong])
        line = problem(tiny.loaded(*overrides), *named)
        validate(tiny.loaded(*mended(overrides, line)))
