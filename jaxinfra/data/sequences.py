"""Makes batches for language models from tokens, in NumPy: consecutive tokens, or packed documents.

Consecutive tokens: sequence i is the `seq_len + 1` tokens from token `i * seq_len` on, so every token but the first is
a target exactly once. Nothing is padded, and a last part that is too short is dropped. Packed rows hold whole
documents, or segments of long ones (see `packing`), and end with padding.

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
    is_start_BT = np.empty(shape, bool)
    is_start_BT[:, 0] = True
    np.equal(tokens_BW[:, :-2], eot_id, out=is_start_BT[:, 1:])
    start_S = np.flatnonzero(is_start_BT)  # few, so that all further work on them is cheap
    first_segment_B = np.flatnonzero(start_S % T == 0)
    segments_per_row_B = np.diff(first_segment_B, append=len(start_S))
    number_S = np.arange(1, len(start_S) + 1) - np.repeat(first_segment_B, segments_per_row_B)
    batch |= _segment_arrays(shape, np.diff(start_S, append=B * T), number_S)
    weights_BT = batch["weights"]
    weights_BT[:] = 1 if mask_BW is None else mask_BW[:, 1:] != 0
    # The position before each start has an end of document as input. For the start of a row this is the last position
    # of the row before, which need not be one, so the last column is saved and set again.
    last_B = np.where(tokens_BW[:, -2] == eot_id, 0, weights_BT[:, -1])
    weights_BT.reshape(-1)[start_S[1:] - 1] = 0
    weights_BT[:, -1] = last_B
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
        seq_len: T.
        mask_N: nonzero for tokens that count as targets in the loss; None counts all.
    """
    shape = B, T = len(segments_B), seq_len
    token_end_P, target_end_P = np.cumsum(length_P + 1), np.cumsum(length_P)
    segment_end_B = np.cumsum(segments_B)
    target_end_B = target_end_P[segment_end_B - 1]
    filled_B = np.diff(target_end_B, prepend=0)
    assert len(tokens_N) == token_end_P[-1] and filled_B.max() <= T, "segments do not fit the tokens or the rows"

    def padded_rows(values_N: np.ndarray, omitted_P: np.ndarray, dtype: type) -> np.ndarray:
        out_BT = buffers.empty(shape, dtype)
        kept = np.delete(values_N, omitted_P)
        for row, end, filled in zip(out_BT, target_end_B.tolist(), filled_B.tolist(), strict=True):
            row[:filled], row[filled:] = kept[end - filled : end], 0
        return out_BT

    first_P, last_P = token_end_P - length_P - 1, token_end_P - 1
    batch = {"inputs": padded_rows(tokens_N, last_P, np.int32), "targets": padded_rows(tokens_N, first_P, np.int32)}
    number_P = np.arange(1, len(length_P) + 1) - np.repeat(segment_end_B - segments_B, segments_B)
    length_S = np.insert(length_P.astype(np.int64), segment_end_B, T - filled_B)
    batch |= _segment_arrays(shape, length_S, np.insert(number_P, segment_end_B, 0))
    batch["weights"][:] = batch["segments"] != 0 if mask_N is None else padded_rows(mask_N != 0, first_P, np.float32)
    return batch


def _segment_arrays(shape: tuple[int, ...], length_S: np.ndarray, number_S: np.ndarray) -> Batch:
    """Returns `segments` and `positions` for segments of these lengths and numbers, and empty `weights` to fill."""
    length_S, number_S = length_S[length_S > 0], number_S[length_S > 0]
    block = buffers.empty((3, *shape), np.int32)
    block[0].reshape(-1)[:] = np.repeat(number_S.astype(np.int32), length_S)
    # Positions are a running sum: each step adds 1, and the start of a segment subtracts the length of the one before.
    steps_N = block[1].reshape(-1)
    steps_N[:] = 1
    steps_N[0] = 0
    steps_N[np.cumsum(length_S[:-1])] -= length_S[:-1]
    np.cumsum(steps_N, out=steps_N)
    return {"segments": block[0], "positions": block[1], "weights": block[2].view(np.float32)}
