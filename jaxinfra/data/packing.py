"""Packs whole documents into rows when a store is prepared: best fit decreasing, in NumPy.

Rows of consecutive tokens would cut most documents. Packing cuts only documents longer than a row, and rows are nearly
as full (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3). A row has room for `seq_len`
targets, each with the token before it as input. A document of n tokens has n - 1 targets, because its first token has
no input. A document that is longer than a row becomes several segments. Each starts with the last token of the one
before, so that every token but the first is a target exactly once.

Rows with the same free room are interchangeable, so all segments of one length are placed together. The result is the
same as of the plain algorithm, but takes one operation per pair of a length and a room, not one per segment.

Shape suffixes: N documents, P segments, R rows.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jaxinfra.config.limits import PositiveInt


@dataclass(frozen=True, kw_only=True)
class PackSpec:
    """A packing that a recipe makes of the documents of its store.

    Attributes:
        seq_len: targets of a row.
        by_length: whether a row holds only documents of similar length, for runs with a `Curriculum`.
    """

    seq_len: PositiveInt
    by_length: bool = False

    @property
    def name(self) -> str:
        """Name of the packing in a store."""
        return f"{self.seq_len}-by-length" if self.by_length else str(self.seq_len)


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The segments of each row; rows are sorted by their longest segment, for a `Curriculum`."""

    seq_len: int  # room of a row, in targets
    segment_document: np.ndarray  # document of each segment, int64[P]
    segment_start: np.ndarray  # tokens of the document before the segment, int64[P]
    segment_length: np.ndarray  # targets of the segment, 1 to `seq_len`, int32[P]; it has one token more
    row_offsets: np.ndarray  # int64[R + 1]: row r has segments `row_offsets[r]` to `row_offsets[r + 1]`, longest first

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1

    @property
    def efficiency(self) -> float:
        """Share of the room that targets fill; 1 if there are no rows."""
        return int(self.segment_length.sum()) / (self.num_rows * self.seq_len) if self.num_rows else 1.0

    @property
    def cut_documents(self) -> int:
        """Documents in more than one segment."""
        return int(np.count_nonzero(self.segment_start == self.seq_len))


def pack_documents(lengths_N: np.ndarray, seq_len: int, *, by_length: bool = False) -> PackedRows:
    """Packs documents into as few rows as best fit decreasing finds.

    Args:
        lengths_N: tokens of each document with its end, of any integer type; ValueError if one is negative. A document
            of one token has no target and is left out.
        seq_len: targets of a row, 1 to 2**31 - 1, else ValueError.
        by_length: packs segments of up to 1, 2, 4, 8, ... targets separately, so that rows of short documents have no
            long ones (after the dataset decomposition of Pouransari et al. 2024). Rows of documents a little longer
            than half a row then stay half empty.
    """
    if not 1 <= seq_len < 2**31 or (lengths_N < 0).any():
        raise ValueError(f"seq_len={seq_len}: expected 1 to 2**31 - 1, and no document of negative length")
    document_P, start_P, length_P = _cut_documents(lengths_N, seq_len)
    room_left_P = seq_len - length_P  # rises as lengths fall; NumPy sorts 16 bits much faster
    longest_first_P = np.argsort(room_left_P.astype(np.uint16) if seq_len < 2**16 else room_left_P, kind="stable")
    length_P = length_P[longest_first_P]
    row_P = np.empty(len(length_P), np.int64)
    num_rows = 0
    for start, end in _length_classes(length_P) if by_length else [(0, len(length_P))]:
        row_P[start:end], count = _best_fit(length_P[start:end], seq_len)
        row_P[start:end] += num_rows
        num_rows += count
    longest_R = np.zeros(num_rows, np.int32)
    longest_R[row_P[::-1]] = length_P[::-1]  # reversed, so that the first and longest segment of a row is assigned last
    number_R = np.empty(num_rows, np.int64)  # new number of each row: its rank by longest segment
    number_R[np.argsort(longest_R, kind="stable")] = np.arange(num_rows)
    row_P = number_R[row_P]
    by_row_P = np.argsort(row_P, kind="stable")
    order_P = longest_first_P[by_row_P]
    return PackedRows(
        seq_len=seq_len,
        segment_document=document_P[order_P],
        segment_start=start_P[order_P],
        segment_length=length_P[by_row_P],
        row_offsets=np.concatenate([[0], np.cumsum(np.bincount(row_P, minlength=num_rows))]),
    )


def _cut_documents(lengths_N: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns document, start and targets of each segment, in the order of the text."""
    targets_N = np.maximum(lengths_N.astype(np.int64) - 1, 0)
    segments_N = -(-targets_N // seq_len)
    document_P = np.repeat(np.arange(len(targets_N)), segments_N)
    first_N = np.cumsum(segments_N) - segments_N
    start_P = (np.arange(len(document_P)) - np.repeat(first_N, segments_N)) * seq_len
    return document_P, start_P, np.minimum(targets_N[document_P] - start_P, seq_len).astype(np.int32)


def _length_classes(falling_P: np.ndarray) -> list[tuple[int, int]]:
    """Returns start and end of each run of lengths that round up to the same power of two; lengths fall."""
    power_P = np.frexp(falling_P - 1)[1]
    return list(pairwise([0, *(np.flatnonzero(np.diff(power_P)) + 1).tolist(), len(falling_P)]))


def _best_fit(falling_P: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Returns the row of each segment, and the number of rows; the segments are sorted from long to short."""
    row_P = np.empty(len(falling_P), np.int64)
    open_rows, num_rows = _OpenRows(seq_len), 0
    # Segments `at` to `end` have the same length. They fill the open rows with the least room first, then new rows.
    for at, end in pairwise([*np.flatnonzero(np.diff(falling_P, prepend=0)).tolist(), len(falling_P)]):
        length = int(falling_P[at])
        for room in open_rows.rooms_from(length):
            if at == end:
                break
            rows_needed = -(-(end - at) // (room // length))
            at += open_rows.fill(row_P[at:end], open_rows.take(room, rows_needed), room, length)
        new_rows = -(-(end - at) // (seq_len // length))
        open_rows.fill(row_P[at:end], np.arange(num_rows, num_rows + new_rows), seq_len, length)
        num_rows += new_rows
    return row_P, num_rows


class _OpenRows:
    """Rows that are not full, by the room that is left in them."""

    def __init__(self, seq_len: int):
        self._rows: dict[int, list[np.ndarray]] = {}
        self._has_rows = np.zeros(seq_len + 1, bool)

    def rooms_from(self, length: int) -> list[int]:
        """Returns the rooms of open rows that a segment of this length fits in, smallest first."""
        return (np.flatnonzero(self._has_rows[length:]) + length).tolist()

    def take(self, room: int, limit: int) -> np.ndarray:
        """Removes and returns up to `limit` rows with this room, the last added ones first."""
        stack, taken, count = self._rows[room], [], 0
        while stack and count < limit:
            taken.append(stack.pop())
            count += len(taken[-1])
        if count > limit:
            split = len(taken[-1]) - (count - limit)
            stack.append(taken[-1][split:])
            taken[-1] = taken[-1][:split]
        self._has_rows[room] = bool(stack)
        return np.concatenate(taken)

    def fill(self, out_P: np.ndarray, rows: np.ndarray, room: int, length: int) -> int:
        """Places segments of one length into rows with this room; returns how many it placed.

        Writes the row of each placed segment to `out_P`, in place. `rows` are no more than the segments need.
        """
        per_row = room // length
        full = min(len(rows), len(out_P) // per_row)
        out_P[: full * per_row] = np.repeat(rows[:full], per_row)
        self._add(room - per_row * length, rows[:full])
        if full == len(rows):
            return full * per_row
        rest = len(out_P) - full * per_row  # fewer than `per_row`, for the last row
        out_P[full * per_row :] = rows[full]
        self._add(room - rest * length, rows[full:])
        return len(out_P)

    def _add(self, room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            self._rows.setdefault(room, []).append(rows)
            self._has_rows[room] = True
