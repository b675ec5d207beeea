"""Packing of whole documents into rows, when a store is prepared: best fit, longest first, in NumPy.

Text that is laid end to end and cut into rows cuts most documents; packed, a document is cut only if it is longer
than a row, and rows are nearly as full (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3).
A row has room for `seq_len` targets, each beside the token before it. A document of n tokens has n - 1 of them, as
the first follows nothing; one that is longer than a row becomes pieces that share one token, so that every token but
the first of a document is a target exactly once.

Rows with equally much room are alike, so pieces of one length go into all of them at once, and a row takes as many of
them as fit: the rows are those of the plain algorithm, in one operation for each pair of a length and a room that meet
instead of one for each piece.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jaxinfra.config.limits import Count


@dataclass(frozen=True, kw_only=True)
class PackSpec:
    """Rows that a recipe has whole documents packed into.

    Attributes:
        seq_len: targets of a row.
        by_length: whether a row holds documents of like length alone, for runs that begin with the short ones.
    """

    seq_len: Count
    by_length: bool = False

    @property
    def name(self) -> str:
        """What it is called in a store."""
        return f"{self.seq_len}-by-length" if self.by_length else str(self.seq_len)


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Lists the pieces of each row; rows are numbered by rising length of their longest piece, for a `Curriculum`."""

    seq_len: int  # room of a row, in targets
    segment_document: np.ndarray  # document of each piece, int64[P]
    segment_start: np.ndarray  # its tokens before the piece, int64[P]
    segment_length: np.ndarray  # targets of the piece, 1 to `seq_len`, int32[P]; it reads one token more
    row_offsets: np.ndarray  # row r has pieces `row_offsets[r]` to `row_offsets[r + 1]`, longest first; int64[rows + 1]

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.row_offsets) - 1

    @property
    def efficiency(self) -> float:
        """Share of the room that targets take; 1 where there is none."""
        return int(self.segment_length.sum()) / (self.rows * self.seq_len) if self.rows else 1.0

    @property
    def cut_documents(self) -> int:
        """Documents in more than one piece."""
        return int(np.count_nonzero(self.segment_start == self.seq_len))


def pack_documents(lengths_N: np.ndarray, seq_len: int, *, by_length: bool = False) -> PackedRows:
    """Packs documents into as few rows as best fit, longest first, finds.

    Args:
        lengths_N: tokens of each document with its end, any integer type, none negative (else ValueError); a document
            of one token gives nothing.
        seq_len: targets of a row, 1 to 2**31 - 1, else ValueError.
        by_length: keep pieces of up to 1, 2, 4, 8, ... targets apart, so that rows of short documents have no long
            ones (after the dataset decomposition of Pouransari et al. 2024); documents a little longer than half a
            row then leave the rest of it empty.
    """
    if not 1 <= seq_len < 2**31 or (lengths_N < 0).any():
        raise ValueError(f"seq_len={seq_len}: expected 1 to 2**31 - 1, and no document of negative length")
    document_P, skip_P, length_P = _pieces(lengths_N, seq_len)
    falling = seq_len - length_P
    longest_first = np.argsort(falling.astype(np.uint16) if seq_len < 2**16 else falling, kind="stable")
    length_P = length_P[longest_first]
    row_P = np.empty(len(length_P), np.int64)
    rows = 0
    for start, end in _classes(length_P) if by_length else [(0, len(length_P))]:
        row_P[start:end], more = _best_fit(length_P[start:end], seq_len)
        row_P[start:end] += rows
        rows += more
    longest_R = np.zeros(rows, np.int32)
    longest_R[row_P[::-1]] = length_P[::-1]  # of several assignments the last counts: that of the first piece
    number_R = np.empty(rows, np.int64)
    number_R[np.argsort(longest_R, kind="stable")] = np.arange(rows)
    row_P = number_R[row_P]
    by_row = np.argsort(row_P, kind="stable")
    chosen = longest_first[by_row]
    return PackedRows(
        seq_len=seq_len,
        segment_document=document_P[chosen],
        segment_start=skip_P[chosen],
        segment_length=length_P[by_row],
        row_offsets=np.concatenate([[0], np.cumsum(np.bincount(row_P, minlength=rows))]),
    )


def _pieces(lengths_N: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, skipped tokens and targets of each piece, in the order of the text."""
    targets_N = np.maximum(lengths_N.astype(np.int64) - 1, 0)
    pieces_N = -(-targets_N // seq_len)
    document_P = np.repeat(np.arange(len(targets_N)), pieces_N)
    first_N = np.cumsum(pieces_N) - pieces_N
    skip_P = (np.arange(len(document_P)) - np.repeat(first_N, pieces_N)) * seq_len
    return document_P, skip_P, np.minimum(targets_N[document_P] - skip_P, seq_len).astype(np.int32)


def _classes(falling_P: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of lengths with the same power of two at or above them start and end."""
    power_P = np.frexp(falling_P - 1)[1]
    return list(pairwise([0, *(np.flatnonzero(np.diff(power_P)) + 1).tolist(), len(falling_P)]))


def _best_fit(falling_P: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """The row of each of these pieces, longest first, and how many rows there are."""
    row_P = np.empty(len(falling_P), np.int64)
    rooms, rows = _Rooms(seq_len), 0
    for at, end in pairwise([*np.flatnonzero(np.diff(falling_P, prepend=0)).tolist(), len(falling_P)]):
        length = int(falling_P[at])
        for room in rooms.from_length(length):
            if at == end:
                break
            each = room // length
            at += rooms.fill(row_P[at:end], rooms.take(room, -(-(end - at) // each)), room, length)
        fresh = -(-(end - at) // (seq_len // length))
        rooms.fill(row_P[at:end], np.arange(rows, rows + fresh), seq_len, length)
        rows += fresh
    return row_P, rows


class _Rooms:
    """Rows by the room that they have left."""

    def __init__(self, seq_len: int):
        self._rows: dict[int, list[np.ndarray]] = {}
        self._some = np.zeros(seq_len + 1, bool)

    def from_length(self, length: int) -> list[int]:
        """The rooms that rows have in which a piece fits, rising."""
        return (np.flatnonzero(self._some[length:]) + length).tolist()

    def take(self, room: int, at_most: int) -> np.ndarray:
        """Takes rows with this room out, those that came last first."""
        stack, taken, count = self._rows[room], [], 0
        while stack and count < at_most:
            taken.append(stack.pop())
            count += len(taken[-1])
        if count > at_most:
            split = len(taken[-1]) - (count - at_most)
            stack.append(taken[-1][split:])
            taken[-1] = taken[-1][:split]
        self._some[room] = bool(stack)
        return np.concatenate(taken)

    def fill(self, out_P: np.ndarray, rows: np.ndarray, room: int, length: int) -> int:
        """Puts as many pieces of one length as there are, or as fit, into rows with this room; says how many.

        `out_P` takes the row of each piece; `rows` are no more than are needed.
        """
        each = room // length
        full = min(len(rows), len(out_P) // each)
        out_P[: full * each] = np.repeat(rows[:full], each)
        self._put(room - each * length, rows[:full])
        if full == len(rows):
            return full * each
        rest = len(out_P) - full * each  # for the last row, which takes fewer
        out_P[full * each :] = rows[full]
        self._put(room - rest * length, rows[full:])
        return len(out_P)

    def _put(self, room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            self._rows.setdefault(room, []).append(rows)
            self._some[room] = True
