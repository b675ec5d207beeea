"""Packs whole documents into rows when a store is prepared: best fit decreasing, in NumPy.

Rows of consecutive tokens would cut most documents. Packing cuts only documents longer than a row, and rows are nearly
as full (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3). A row has room for `seq_len`
targets, each with the token before it as input. A document of n tokens has n - 1 targets, because its first token has
no input. A document that is longer than a row is cut into segments. Each starts with the last token of the one before,
so that every token but the first is a target exactly once.

Best fit decreasing places the segments from long to short, each into the row with the least room that it fits in, else
into a new row. With `seq_len=4` and documents of 6, 3 and 2 tokens:

    document 0, 5 targets   ->  segments of 4 targets (from token 0 on) and 1 target (from token 4 on)
    document 1, 2 targets   ->  a segment of 2
    document 2, 1 target    ->  a segment of 1
    rows                    ->  [4] and [2, 1, 1], both full

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
        return int(np.count_nonzero(self.segment_start == self.seq_len))  # each has one second segment


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
    # Segments share a row only within their class. The exponent of frexp(n - 1) is 0 for 1 target, 1 for 2, 2 for 3 and
    # 4, 3 for 5 to 8, and so on.
    class_P = np.frexp(length_P - 1)[1] if by_length else np.zeros_like(length_P)
    row_P = np.empty(len(length_P), np.int64)
    num_rows = 0
    for start, end in pairwise(_run_bounds(class_P).tolist()):
        row_P[start:end], count = _best_fit(length_P[start:end], seq_len)
        row_P[start:end] += num_rows
        num_rows += count
    _, first_segment_R = np.unique(row_P, return_index=True)
    longest_R = length_P[first_segment_R]
    by_row_P = np.lexsort((row_P, longest_R[row_P]))  # by the longest segment of the row, then by row
    order_P = longest_first_P[by_row_P]  # from the order in the text to that in the rows
    return PackedRows(
        seq_len=seq_len,
        segment_document=document_P[order_P],
        segment_start=start_P[order_P],
        segment_length=length_P[by_row_P],
        row_offsets=_run_bounds(row_P[by_row_P]),
    )


def _cut_documents(lengths_N: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns document, first token and number of targets of each segment, in the order of the text.

    Lengths of 6 and 3 with `seq_len=4` give the documents 0, 0, 1, first tokens 0, 4, 0, and targets 4, 1, 2.
    """
    targets_N = np.maximum(lengths_N.astype(np.int64) - 1, 0)
    segments_N = -(-targets_N // seq_len)
    document_P = np.repeat(np.arange(len(targets_N)), segments_N)
    first_segment_N = np.cumsum(segments_N) - segments_N
    start_P = (np.arange(len(document_P)) - first_segment_N[document_P]) * seq_len
    return document_P, start_P, np.minimum(targets_N[document_P] - start_P, seq_len).astype(np.int32)


def _best_fit(length_P: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Returns the row of each segment, and the number of rows; the segments are sorted from long to short.

    Rows with the same room are interchangeable, so segments of one length are placed together. This takes one step for
    each pair of a length and a room, not one for each segment, and finds the same number of rows.
    """
    row_P = np.empty(len(length_P), np.int64)
    num_rows = 0
    rows_by_room: dict[int, np.ndarray] = {}  # room left, in targets -> rows, the last changed ones first
    has_rows = np.zeros(seq_len + 1, bool)  # whether `rows_by_room` has rows for each room

    def add_rows(rows: np.ndarray, room: int) -> None:
        if room and len(rows):
            rows_by_room[room] = np.concatenate([rows, rows_by_room[room]]) if has_rows[room] else rows
            has_rows[room] = True

    for start, end in pairwise(_run_bounds(length_P).tolist()):
        length = int(length_P[start])
        rooms = (np.flatnonzero(has_rows[length:]) + length).tolist()  # from the least room that the segments fit in
        for room in [*rooms, seq_len]:  # new rows come last
            if start == end:
                break
            per_row = room // length
            rows_needed = -(-(end - start) // per_row)
            if room == seq_len:
                rows = np.arange(num_rows, num_rows + rows_needed)
                num_rows += rows_needed
            else:
                rows, rows_by_room[room] = np.split(rows_by_room[room], [rows_needed])
                has_rows[room] = len(rows_by_room[room]) > 0
            placed = min(len(rows) * per_row, end - start)
            row_P[start : start + placed] = np.repeat(rows, per_row)[:placed]
            start += placed
            # 7 segments with 3 per row fill 2 rows; the last row gets 1 segment.
            full, rest = divmod(placed, per_row)
            add_rows(rows[:full], room - per_row * length)
            add_rows(rows[full:], room - rest * length)
    return row_P, num_rows


def _run_bounds(values_P: np.ndarray) -> np.ndarray:
    """Returns the start of each run of equal values, which are at least 0, and the end: [7, 7, 2] -> [0, 2, 3]."""
    return np.append(np.flatnonzero(np.diff(values_P, prepend=-1)), len(values_P))
