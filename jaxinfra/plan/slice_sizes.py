"""The sizes in the cloud's names of TPU slices, such as `v5p-128`, and their shapes.

A size counts TensorCores for v4 and v5p, which have two a chip, and chips for v5e (`v5litepod`) and v6e. Each size
has a default shape. Sources: the pages on v5e, v5p and v6e of Google Cloud's TPU documentation, and the lists of
accelerators in Google's xpk and MaxText, without shapes that exceed the chip's `max_slice` or cannot be scheduled.
"""

import math

_V4 = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16"
_V5P = """
    2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x4x20 4x8x12 4x4x28 8x8x8 4x12x12 4x8x20 8x8x12 4x8x28 4x12x20
    8x8x16 8x12x12 8x8x20 4x12x28 8x12x16 4x20x20 12x12x12 8x8x28 8x12x20 8x16x16 4x20x28 12x12x16 8x16x20 8x12x28
    12x12x20 12x16x16 4x28x28 8x20x20 12x12x24 8x16x28 12x16x20 12x12x28 16x16x16 8x20x28 12x16x24 12x20x20 16x16x20
    12x16x28 12x20x24 16x16x24
"""
_V5E = _V6E = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
COUNTED_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
SLICES = {
    chip: {COUNTED_PER_CHIP[chip] * math.prod(map(int, shape.split("x"))): shape for shape in shapes.split()}
    for chip, shapes in {"v4": _V4, "v5p": _V5P, "v5e": _V5E, "v6e": _V6E}.items()
}
"""The default shape of each size, by chip."""


def nearest_sizes(chip: str, size: int) -> list[int]:
    """Returns the largest size up to `size`, and the smallest above it."""
    return [*[s for s in SLICES[chip] if s <= size][-1:], *[s for s in SLICES[chip] if s > size][:1]]
