"""Compares two checkpoints leaf by leaf, in the memory of one leaf of each. Imports no JAX."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxinfra.checkpoint.inventory import verify_step
from jaxinfra.checkpoint.manifest import Manifest
from jaxinfra.checkpoint.step_store import StepStore
from jaxinfra.errors import CheckpointError

_CHUNK = 1 << 22  # elements that are compared at once, in float64


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One step, with its manifest; `open` verifies it."""

    stored: StepStore
    step: int
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.stored.location}/{self.step}"


@dataclass(frozen=True, kw_only=True)
class LeafDifference:
    """How a leaf differs; `is_equal` if all bits are equal."""

    name: str  # of the leaf
    is_equal: bool  # whether the types and all bits are equal
    left: str  # its type on the left, "missing" without one
    right: str  # its type on the right
    largest: float | None = None  # the largest absolute difference of two values; None if the types differ
    norm: float = 0.0  # the norm of the difference
    left_norm: float = 0.0  # the norm on the left

    @property
    def relative(self) -> float:
        """The norm of the difference, relative to that on the left; infinite if that is 0."""
        return self.norm / self.left_norm if self.left_norm else math.inf


def open_checkpoint(stored: StepStore, step: int) -> Checkpoint:
    """Verifies a step and returns it; raises CheckpointError if it is missing or damaged."""
    steps = stored.steps()
    if step not in steps:
        existing = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"checkpoint {stored.location}/{step}: does not exist; existing steps: {existing}")
    found = verify_step(stored, step)
    if found.problems:
        raise CheckpointError(f"checkpoint {stored.location}/{step}: damaged: {found.problems[0]}; name another step")
    if found.is_gone:
        raise CheckpointError(f"checkpoint {stored.location}/{step}: was deleted in the meantime; name another step")
    return Checkpoint(stored=stored, step=step, manifest=stored.manifest(step))


def compare_leaves(left: Checkpoint, right: Checkpoint) -> Iterator[LeafDifference]:
    """Yields for each leaf of either side how it differs."""
    left_types, right_types = left.manifest.leaves, right.manifest.leaves
    for name in {**left_types, **right_types}:
        types = left_types.get(name, "missing"), right_types.get(name, "missing")
        if types[0] != types[1]:
            yield LeafDifference(name=name, is_equal=False, left=types[0], right=types[1])
            continue
        arrays = [each.stored.read_leaf(each.step, each.manifest, name) for each in (left, right)]
        yield _compare(name, types[0], *(array.reshape(-1) for array in arrays))


def _compare(name: str, leaf_type: str, left: np.ndarray, right: np.ndarray) -> LeafDifference:
    largest = squares = left_squares = 0.0
    is_equal, wide = True, np.complex128 if left.dtype.kind == "c" else np.float64
    for start in range(0, left.size, _CHUNK):
        a, b = left[start : start + _CHUNK], right[start : start + _CHUNK]
        is_equal = is_equal and np.array_equal(a.view(np.uint8), b.view(np.uint8))
        wide_a = a.astype(wide)
        with np.errstate(invalid="ignore"):  # of infinite values
            difference = np.abs(wide_a - b.astype(wide))
        largest = float(np.maximum(largest, difference.max()))  # NaN stays
        squares += float(np.square(difference).sum())
        left_squares += float(np.square(np.abs(wide_a)).sum())
    return LeafDifference(
        name=name,
        is_equal=is_equal,
        left=leaf_type,
        right=leaf_type,
        largest=largest,
        norm=math.sqrt(squares),
        left_norm=math.sqrt(left_squares),
    )
