"""Names of the files and arrays of a version of a store; docs/data.md describes them."""

from dataclasses import dataclass

TOKENS, MASK, OFFSETS, LENGTHS = "tokens", "mask", "offsets", "lengths"  # arrays of a split of text
IMAGES, LABELS = "images", "labels"  # arrays of a split of images
PACKS, ROWS, SEGMENTS = "packs", "rows", "segments"  # of a packing: its folder is `packs/NAME`
DESCRIPTION = "zarr.json"  # in the folder of each array
TABLE_HASHES = 128 * 1024
"""Hashes in one file of the table of an array: 1 MiB for 1 GiB of tokens of two bytes."""
HASH_BYTES = 8  # of an XXH3-64


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """Describes one array of a version."""

    elements: int
    block: int  # elements of a block: what is read at once and has a hash; the last block may have fewer

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.elements // self.block)


def table_name(array: str, number: int) -> str:
    """Returns the name of a file with hashes of the blocks of an array: `train/tokens.blocks/0`."""
    return f"{array}.blocks/{number}"


def table_sizes(array: str, blocks: int) -> dict[str, int]:
    """Returns the bytes of each file with hashes of the blocks of an array, by name."""
    starts = range(0, blocks, TABLE_HASHES)
    return {
        table_name(array, number): HASH_BYTES * min(TABLE_HASHES, blocks - start) for number, start in enumerate(starts)
    }


def holds_blocks(file: str) -> bool:
    """Returns whether a file holds blocks of an array, such as `train/tokens/c/0`: it has no hash as a whole."""
    return "/c/" in file
