"""Makes batches for language models from tokens, in NumPy: consecutive tokens, or packed documents.

Consecutive tokens: sequence i is the `seq_len + 1` tokens from token `i * seq_len` on, so every token but the first is
a target exactly once. Nothing is padded, and a last part that is too short is dropped. Packed rows hold whole
documents, or segments of long ones (see `packing`), and end with padding.

Two rows of consecutive and of packed tokens, where 0 ends a document in the left one, and the right one has segments of
the tokens 5 6 7, 8 9 and 3 4:

                 consecutive            packed
    inputs       5 6 0 7   8 0 9 3      5 6 8 0   3 0 0 0
    targets      6 0 7 8   0 9 3 4      6 7 9 0   4 0 0 0
    segments     1 1 1 2   1 1 2 2      1 1 2 0   1 0 0 0
    positions    0 1 2 0   0 1 0 1      0 1 0 0   0 0 1 2
    weights      1 1 0 1   1 0 1 1      1 1 1 0   1 0 0 0

Shape suffixes: B rows, T positions, W = T + 1 tokens of a row, N tokens, P packed segments, S segments and padding.
"""

import numpy as np

from jaxinfra.data import buffers
from jaxinfra.data.interfaces import Batch


def num_sequences(num_tokens: int, seq_len: int) -> int:
    """Returns the number of sequences in a split."""
    return max(0, (num_tokens - 1) // seq_len)


def split_inputs_targets(
    tokens_BW: np.ndarray, *, eot_id: int, mask_documents: bool, mask_BW: np.ndarray | None = None
) -> Batch:
    """Makes a batch of consecutive tokens.

    Args:
        tokens_BW: token ids.
        eot_id: the last token of each document.
        mask_documents: whether to number the documents of a row, for attention masks.
        mask_BW: nonzero for tokens that count as targets in the loss; None counts all.

    Returns:
        `inputs` and `targets`, int32[B, T]. With `mask_documents` also
        `segments`, int32[B, T]: number of the document in the row, from 1;
        `positions`, int32[B, T]: position in the document, or in the part of it in this row, from 0.
        With either mask also
        `weights`, float32[B, T]: 0 if input and target are of different documents, or `mask_BW` is 0; else 1.
    """
    ids_BW = buffers.empty(tokens_BW.shape, np.int32)
    ids_BW[:] = tokens_BW
    batch = {"inputs": ids_BW[:, :-1], "targets": ids_BW[:, 1:]}
    B, T = shape = batch["inputs"].shape
    if not mask_documents:
        if mask_BW is not None:
            batch["weights"] = buffers.empty(shape, np.float32)
            batch["weights"][:] = mask_BW[:, 1:] != 0
        return batch
    is_start_BT = np.empty(shape, bool)  # where a segment starts: a document, or the part of it in this row
    is_start_BT[:, 0] = True
    np.equal(tokens_BW[:, :-2], eot_id, out=is_start_BT[:, 1:])
    start_S = np.flatnonzero(is_start_BT)  # few, so that all further work on them is cheap
    segments_B = is_start_BT.sum(axis=1)
    batch |= _segment_arrays(shape, np.diff(start_S, append=B * T), _count_from_1(segments_B))
    batch["weights"][:] = tokens_BW[:, :-1] != eot_id  # after the end of a document, the target is of another one
    if mask_BW is not None:
        batch["weights"] *= mask_BW[:, 1:] != 0
    return batch


def packed_batch(
    tokens_N: np.ndarray,
    length_P: np.ndarray,
    segments_B: np.ndarray,
    *,
    seq_len: int,
    mask_N: np.ndarray | None = None,
) -> Batch:
    """Makes a batch of packed rows, with the same arrays as `split_inputs_targets` with document masks.

    Every packed segment has its own number and positions from 0. Padding has number 0, weight 0 and positions from 0.

    Args:
        tokens_N: concatenated token ids of the segments of all rows.
        length_P: number of targets of each segment, which has one token more.
        segments_B: number of segments of each row, which have at most `seq_len` targets together.
        seq_len: T, the number of positions of a row.
        mask_N: nonzero for tokens that count as targets in the loss; None counts all.
    """
    shape = B, T = len(segments_B), seq_len
    token_end_P, target_end_P = np.cumsum(length_P + 1), np.cumsum(length_P)
    segment_end_B = np.cumsum(segments_B)
    target_end_B = target_end_P[segment_end_B - 1]
    filled_B = np.diff(target_end_B, prepend=0)  # targets of each row
    assert len(tokens_N) == token_end_P[-1] and filled_B.max() <= T, "segments do not fit the tokens or the rows"

    def padded_rows(values_N: np.ndarray, left_out_P: np.ndarray, dtype: type) -> np.ndarray:
        """Arranges the values, without one of each segment, in rows that end with zeros."""
        out_BT = buffers.empty(shape, dtype)
        kept = np.delete(values_N, left_out_P)
        for row, end, filled in zip(out_BT, target_end_B.tolist(), filled_B.tolist(), strict=True):
            row[:filled] = kept[end - filled : end]
            row[filled:] = 0
        return out_BT

    first_P, last_P = token_end_P - length_P - 1, token_end_P - 1  # the first token is no target, the last no input
    batch = {"inputs": padded_rows(tokens_N, last_P, np.int32), "targets": padded_rows(tokens_N, first_P, np.int32)}
    # Padding is one more segment at the end of each row, with number 0.
    length_S = np.insert(length_P.astype(np.int64), segment_end_B, T - filled_B)
    number_S = np.insert(_count_from_1(segments_B), segment_end_B, 0)
    batch |= _segment_arrays(shape, length_S, number_S)
    batch["weights"][:] = batch["segments"] != 0 if mask_N is None else padded_rows(mask_N != 0, first_P, np.float32)
    return batch


def _count_from_1(counts: np.ndarray) -> np.ndarray:
    """Numbers the segments of each row from 1: [3, 2] -> [1, 2, 3, 1, 2]."""
    return np.arange(1, counts.sum() + 1) - np.repeat(np.cumsum(counts) - counts, counts)


def _segment_arrays(shape: tuple[int, ...], length_S: np.ndarray, number_S: np.ndarray) -> Batch:
    """Returns `segments` and `positions` for segments of these lengths and numbers, and empty `weights` to fill."""
    block = buffers.empty((3, *shape), np.int32)
    segments_N, positions_N, _ = block.reshape(3, -1)
    segments_N[:] = np.repeat(number_S.astype(np.int32), length_S)
    start_S = (np.cumsum(length_S) - length_S).astype(np.int32)
    np.subtract(np.arange(len(positions_N), dtype=np.int32), np.repeat(start_S, length_S), out=positions_N)
    return {"segments": block[0], "positions": block[1], "weights": block[2].view(np.float32)}
