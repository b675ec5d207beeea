"""The arrays of the splits, part by part, and the cut of a corpus whose tail is validation data.

Parts hold what their jobs read. Where the tail begins is known when all of them are there: its documents are in the
parts as training ones, and are told apart while they are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxinfra.data.store.manifest import Split
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare.builders.overlap import digest_of_values
from jaxinfra.prepare.documents.dedup import Dedup, Signer
from jaxinfra.prepare.parts import Open

_WINDOW = 16  # tokens, of which the last ones show whether a character is cut


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A document that is cut: the first half is for training, the second one is the beginning of the tail.

    Attributes:
        tokens: of the first half, without an end.
        eot_id: the token that ends it.
        rows: of both halves, by the name of an array that has a row a document: [2] or [2, K].
    """

    tokens: int
    eot_id: int
    rows: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the tail begins.

    Attributes:
        index: of the part, among all.
        document: of that part; the tail begins with it.
        halves: how the document is cut; None where the tail begins with the whole of it.
    """

    index: int
    document: int
    halves: Halves | None = None


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Parts in their order, and where they are cut.

    Attributes:
        folder: of the parts.
        numbers: of all.
        cut: where the tail begins; None where the parts say what is of which split.
    """

    folder: Path
    numbers: Sequence[int]
    cut: Cut | None = None

    def read(self, split: Split, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields arrays of a split, for each part.

        Raises:
            DataError: a part is damaged.
        """
        for index, number in enumerate(self.numbers):
            with Open(self.folder, number) as part:
                if self.cut is None:
                    yield tuple(part.read(split, name) for name in names)
                    continue
                lengths_D = part.read("train", "lengths_D")
                yield tuple(
                    part_of(part.read("train", name), name, lengths_D, self.cut, index, split) for name in names
                )

    def where(self, split: Split) -> list[str]:
        """The place of each document of a split, where the parts name them."""
        return [where for (where_D,) in self.read(split, "where_D") for where in where_D.tolist()]


def part_of(values: np.ndarray, name: str, lengths_D: np.ndarray, cut: Cut, index: int, split: Split) -> np.ndarray:
    """What of an array of a part is before the tail ("train"), or in it."""
    before = split == "train"
    start, end = _range(len(lengths_D), cut, index, split)
    halves = cut.halves if index == cut.index else None
    if name.endswith("_N"):
        offsets = np.concatenate([[0], np.cumsum(lengths_D)])
        if halves is None:
            return values[offsets[start] : offsets[end]]
        middle = offsets[cut.document] + halves.tokens
        return np.append(values[:middle], values.dtype.type(halves.eot_id)) if before else values[middle:]
    if halves is None:
        return values[start:end]
    rows = halves.rows[name].astype(values.dtype) if name in halves.rows else values[[cut.document] * 2]
    return np.concatenate([values[:end], rows[:1]] if before else [rows[1:], values[cut.document + 1 :]])


def _range(count: int, cut: Cut, index: int, split: Split) -> tuple[int, int]:
    first = 0 if index > cut.index else count if index < cut.index else cut.document
    return (0, first) if split == "train" else (first, count)


def find_tail(parts: Splits, fraction: float, *, group: int, tokenizer: Tokenizer | None, dedup: Dedup | None) -> Cut:
    """Finds where the last part of the text begins.

    Args:
        parts: all, not cut.
        fraction: of the bytes of text.
        group: documents of a record, which are not parted.
        tokenizer: cuts the document that the tail begins in between two tokens; None leaves documents whole.
        dedup: whether both halves need signatures.

    Raises:
        DataError: a part is damaged.
    """
    sizes = [bytes_D for (bytes_D,) in parts.read("train", "bytes_D")]
    ends = np.cumsum([int(bytes_D.sum()) for bytes_D in sizes])
    left = int(ends[-1] * (1 - fraction))
    index = int(np.searchsorted(ends, left, side="right"))
    if index == len(sizes):
        return Cut(index=index, document=0)
    left -= int(ends[index - 1]) if index else 0
    document = int(np.searchsorted(np.cumsum(sizes[index]), left, side="right"))
    left -= int(sizes[index][:document].sum())
    if tokenizer is not None:
        share = left / int(sizes[index][document])
        halves = _halves(parts.folder, parts.numbers[index], document, share, tokenizer, dedup)
        if halves is not None:
            return Cut(index=index, document=document, halves=halves)
    document = document // group * group
    first = not document and not any(map(len, sizes[:index]))
    return Cut(index=index, document=group if first else document)


def _halves(
    folder: Path, number: int, document: int, share: float, tokenizer: Tokenizer, dedup: Dedup | None
) -> Halves | None:
    """Cuts a document before a token that begins a character; None where no such token is near."""
    with Open(folder, number) as part:
        lengths_D, bytes_D = part.read("train", "lengths_D"), part.read("train", "bytes_D")
        start = int(lengths_D[:document].sum())
        tokens_N = part.read("train", "tokens_N")[start : start + int(lengths_D[document])]
    ids, at = tokens_N[:-1].tolist(), int((len(tokens_N) - 1) * share)
    while 0 < at < len(ids) and tokenizer.decode(ids[max(0, at - _WINDOW) : at]).endswith("\ufffd"):
        at += 1
    if not 0 < at < len(ids):
        return None
    texts = tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:])
    first_bytes = len(texts[0].encode())
    rows = {
        "lengths_D": np.array([at + 1, len(tokens_N) - at]),
        "bytes_D": np.array([first_bytes, int(bytes_D[document]) - first_bytes]),
        "digest_D2": np.array(
            [digest_of_values(np.append(tokens_N[:at], tokens_N[-1])), digest_of_values(tokens_N[at:])], np.uint64
        ),
    }
    if dedup is not None:
        signatures = [Signer(dedup)(text) for text in texts]
        rows["exact_D2"] = np.array([exact for exact, _ in signatures])
        if dedup.near:
            rows["near_DP"] = np.array([near for _, near in signatures])
    return Halves(tokens=at, eot_id=tokenizer.eot_id, rows=rows)
