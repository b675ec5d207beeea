"""The arrays of the splits, part by part, and the cut of a corpus whose tail is validation data.

Parts hold what their jobs read. Where the tail begins is known when all of them are there: its documents are in the
parts as training ones, and are told apart while they are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfra.data.store.manifest import Split
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.overlap import digest_of_values
from jaxinfra.prepare.documents.dedup import Dedup, Signer

_WINDOW = 16  # tokens, of which the last ones show whether a character is cut

type _Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Parts in their order, and where the tail begins.

    Attributes:
        folder: of the parts.
        numbers: of all.
        tail: index of the first part with documents of the tail; None where the parts say what is of which split.
        parted: the arrays of that part, by split.
    """

    folder: Path
    numbers: Sequence[int]
    tail: int | None = None
    parted: Mapping[Split, _Arrays] | None = None

    def read(self, split: Split, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields arrays of a split, for each part.

        Raises:
            DataError: a part is damaged.
        """
        for index, number in enumerate(self.numbers):
            if index == self.tail and self.parted is not None:
                yield tuple(self.parted[split][name] for name in names)
                continue
            with parts.opened(self.folder, number) as part:
                if self.tail is None:
                    yield tuple(part[f"{split}.{name}"] for name in names)
                else:
                    end = None if (index < self.tail) == (split == "train") else 0
                    yield tuple(part[f"train.{name}"][:end] for name in names)


def with_tail(
    splits: Splits, fraction: float, *, group: int, tokenizer: Tokenizer | None, dedup: Dedup | None
) -> Splits:
    """Finds where the last part of the text begins.

    Args:
        splits: of which all is training data so far.
        fraction: of the bytes of text.
        group: documents of a record, which are not parted.
        tokenizer: cuts the document that the tail begins in between two tokens; None leaves documents whole.
        dedup: whether both halves need signatures.

    Raises:
        DataError: a part is damaged.
    """
    sizes = [bytes_D for (bytes_D,) in splits.read("train", "bytes_D")]
    ends = np.cumsum([int(bytes_D.sum()) for bytes_D in sizes])
    left = int(ends[-1] * (1 - fraction))
    index = int(np.searchsorted(ends, left, side="right"))
    if index == len(sizes):
        return replace(splits, tail=index)
    left -= int(ends[index - 1]) if index else 0
    document = int(np.searchsorted(np.cumsum(sizes[index]), left, side="right"))
    left -= int(sizes[index][:document].sum())
    with parts.opened(splits.folder, splits.numbers[index]) as part:
        arrays = {key.removeprefix("train."): part[key] for key in part if key.startswith("train.")}
    if tokenizer is not None:
        parted = _parted_within(arrays, document, left / int(sizes[index][document]), tokenizer, dedup)
        if parted is not None:
            return replace(splits, tail=index, parted=parted)
    document = document // group * group
    if not document and not any(map(len, sizes[:index])):
        document = group  # the first record is for training
    token = int(arrays["lengths_D"][:document].sum())
    at = {name: token if name.endswith("_N") else document for name in arrays}
    train = {name: values[: at[name]] for name, values in arrays.items()}
    heldout = {name: values[at[name] :] for name, values in arrays.items()}
    return replace(splits, tail=index, parted={"train": train, "heldout": heldout})


def _parted_within(
    arrays: _Arrays, document: int, share: float, tokenizer: Tokenizer, dedup: Dedup | None
) -> Mapping[Split, _Arrays] | None:
    """Cuts a document before a token that begins a character; None where no such token is near."""
    start = int(arrays["lengths_D"][:document].sum())
    tokens_N = arrays["tokens_N"][start : start + int(arrays["lengths_D"][document])]
    ids, at = tokens_N[:-1].tolist(), int((len(tokens_N) - 1) * share)
    while 0 < at < len(ids) and tokenizer.decode(ids[max(0, at - _WINDOW) : at]).endswith("\ufffd"):
        at += 1
    if not 0 < at < len(ids):
        return None
    halves = np.append(tokens_N[:at], tokens_N[-1]), tokens_N[at:]
    texts = tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:])
    first_bytes = len(texts[0].encode())
    rows: dict[str, Any] = {
        "lengths_D": [len(half_N) for half_N in halves],
        "bytes_D": [first_bytes, int(arrays["bytes_D"][document]) - first_bytes],
        "digest_D2": [digest_of_values(half_N) for half_N in halves],
    }
    if dedup is not None:
        rows["exact_D2"], rows["near_DP"] = zip(*map(Signer(dedup), texts), strict=True)
    train, heldout = {}, {}
    for name, values in arrays.items():
        if name == "tokens_N":
            train[name], heldout[name] = np.append(values[:start], halves[0]), values[start + at :]
        else:
            both = np.array(rows[name], values.dtype) if name in rows else values[[document] * 2]
            train[name] = np.concatenate([values[:document], both[:1]])
            heldout[name] = np.concatenate([both[1:], values[document + 1 :]])
    return {"train": train, "heldout": heldout}
