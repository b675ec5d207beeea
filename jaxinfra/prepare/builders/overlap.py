"""How documents that are in both splits are found: by hashes of their values."""

import numpy as np
import xxhash


def digest_of_values(values: np.ndarray) -> tuple[int, int]:
    """Returns the 128 bits of XXH3 of an array of one type, in two numbers."""
    digest = xxhash.xxh3_128_intdigest(np.ascontiguousarray(values).data)
    return digest >> 64, digest & (2**64 - 1)


def shared(ours_NK: np.ndarray, theirs_MK: np.ndarray) -> np.ndarray:
    """Tells which rows of `ours` are rows of `theirs` too: bool[N]."""
    found_N = np.isin(ours_NK[:, 0], theirs_MK[:, 0])
    wanted = set(map(tuple, theirs_MK[np.isin(theirs_MK[:, 0], ours_NK[found_N, 0])].tolist()))
    found_N[found_N] = [tuple(row) in wanted for row in ours_NK[found_N].tolist()]
    return found_N
