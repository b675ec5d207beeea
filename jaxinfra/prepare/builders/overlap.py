"""Contamination: validation documents that training documents repeat; how they are found and what becomes of them."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import xxhash

from jaxinfra.errors import DataError

_SHOWN = 3


def digest_of_values(values: np.ndarray) -> tuple[int, int]:
    """The 128 bits of XXH3 of an array of one type, in two numbers."""
    digest = xxhash.xxh3_128_intdigest(np.ascontiguousarray(values).data)
    return digest >> 64, digest & (2**64 - 1)


def shared(ours_NK: np.ndarray, theirs_MK: np.ndarray) -> np.ndarray:
    """Which rows of `ours` are rows of `theirs` too: bool[N]."""
    found_N = np.isin(ours_NK[:, 0], theirs_MK[:, 0])
    wanted = set(map(tuple, theirs_MK[np.isin(theirs_MK[:, 0], ours_NK[found_N, 0])].tolist()))
    found_N[found_N] = [tuple(row) in wanted for row in ours_NK[found_N].tolist()]
    return found_N


def check(on_overlap: Literal["fail", "drop", "keep"], overlap_N: np.ndarray, where: Callable[[], list[str]]) -> None:
    """Ends the work where the recipe says so.

    Args:
        on_overlap: of the recipe.
        overlap_N: which validation documents are in the training split too.
        where: the place of each of them; asked for only if one is named.

    Raises:
        DataError: there is one, and the recipe allows none.
    """
    if on_overlap == "fail" and (found := np.flatnonzero(overlap_N)).size:
        places = where()
        some = ", ".join(places[number] for number in found[:_SHOWN].tolist())
        raise DataError(
            f"on_overlap=fail: {len(found):,} of {len(overlap_N):,} validation documents are in the training split too "
            f"({some}{', ...' if len(found) > _SHOWN else ''}); mend the sources, or leave them out of training by "
            "on_overlap=drop"
        )
