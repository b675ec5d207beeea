"""From tokens to what a language model is trained on, in NumPy: rows of consecutive tokens, or of packed documents.

A split is cut into windows of `seq_len + 1` tokens that start every `seq_len` tokens, so every token but the
first is a target exactly once. Nothing is padded or dropped but the tail shorter than one window. A packed row holds
whole documents, or pieces of long ones (see `packing`), and ends with padding.

Shape suffixes: B rows, T positions, W = T + 1 tokens of a window, N tokens, P pieces, S stretches of one document.
"""

import numpy as np

from jaxinfra.data import buffers
from jaxinfra.data.interfaces import Batch


def num_sequences(tokens: int, seq_len: int) -> int:
    """How many whole windows a split of so many tokens has."""
    return max(0, (tokens - 1) // seq_len)


def split_inputs_targets(
    window_BW: np.ndarray, *, eot_id: int, mask_documents: bool, mask_BW: np.ndarray | None = None
) -> Batch:
    """Makes a batch of windows.

    Args:
        window_BW: token ids.
        eot_id: the token that ends a document and belongs to it.
        mask_documents: whether documents that share a window are kept apart.
        mask_BW: which tokens are learned: nonzero where a token counts as a target. None is all of them.

    Returns:
        `inputs` and `targets`, int32[B, T]. With `mask_documents` also
        `segments`, int32[B, T]: number of the document in the window, from 1;
        `positions`, int32[B, T]: position in the document, or in its part that the window has, from 0.
        With either mask also
        `weights`, float32[B, T]: 0 where input and target are of two documents, or the target is not learned; else 1.
    """
    ids_BW = buffers.empty(window_BW.shape, np.int32)
    ids_BW[:] = window_BW
    batch = {"inputs": ids_BW[:, :-1], "targets": ids_BW[:, 1:]}
    shape = batch["inputs"].shape
    if not mask_documents:
        if mask_BW is not None:
            batch["weights"] = buffers.empty(shape, np.float32)
            batch["weights"][:] = mask_BW[:, 1:] != 0
        return batch
    starts_BT = np.empty(shape, bool)
    starts_BT[:, 0] = True
    np.equal(window_BW[:, :-2], eot_id, out=starts_BT[:, 1:])
    start_S = np.flatnonzero(starts_BT)  # few: all that follows from them is cheap
    row_B = np.flatnonzero(start_S % shape[1] == 0)
    stretches_B = np.append(row_B[1:], len(start_S)) - row_B
    number_S = np.arange(1, len(start_S) + 1) - np.repeat(row_B, stretches_B)
    batch |= _stretches(shape, np.append(start_S[1:], starts_BT.size) - start_S, number_S)
    weights_BT = batch["weights"]
    weights_BT[:] = 1 if mask_BW is None else mask_BW[:, 1:] != 0
    last_B = np.where(window_BW[:, -2] == eot_id, 0, weights_BT[:, -1])
    weights_BT.reshape(-1)[start_S[1:] - 1] = 0
    weights_BT[:, -1] = last_B  # the last of a row is before no start in it
    return batch


def packed_batch(
    tokens_N: np.ndarray, length_P: np.ndarray, pieces_B: np.ndarray, *, seq_len: int, mask_N: np.ndarray | None = None
) -> Batch:
    """Makes a batch of packed rows.

    It is what `split_inputs_targets` returns with document masks. Every piece is a segment with positions from 0, and
    so is padding, with number 0 and weight 0.

    Args:
        tokens_N: token ids of the pieces of all rows, one piece after the other.
        length_P: targets of each piece; it has one token more.
        pieces_B: pieces of each row; together they have at most `seq_len` targets.
        seq_len: T.
        mask_N: which tokens are learned, as in `split_inputs_targets`.
    """
    shape = B, T = len(pieces_B), seq_len
    end_P = np.cumsum(length_P + 1)
    room_P = np.cumsum(length_P)
    last_B = np.cumsum(pieces_B)
    filled_B = np.diff(room_P[last_B - 1], prepend=0)
    assert len(tokens_N) == end_P[-1] and filled_B.max() <= T, "the pieces are not those of the rows"

    def rows(values_N: np.ndarray, without_P: np.ndarray, dtype: type) -> np.ndarray:
        out_BT = buffers.empty(shape, dtype)
        chosen = np.delete(values_N, without_P)
        for row, end, filled in zip(out_BT, room_P[last_B - 1].tolist(), filled_B.tolist(), strict=True):
            row[:filled], row[filled:] = chosen[end - filled : end], 0
        return out_BT

    first_P, final_P = end_P - length_P - 1, end_P - 1
    batch = {"inputs": rows(tokens_N, final_P, np.int32), "targets": rows(tokens_N, first_P, np.int32)}
    number_P = np.arange(1, len(length_P) + 1) - np.repeat(last_B - pieces_B, pieces_B)
    stretch_S = np.insert(length_P.astype(np.int64), last_B, T - filled_B)
    batch |= _stretches(shape, stretch_S, np.insert(number_P, last_B, 0))
    batch["weights"][:] = batch["segments"] != 0 if mask_N is None else rows(mask_N != 0, first_P, np.float32)
    return batch


def _stretches(shape: tuple[int, ...], length_S: np.ndarray, number_S: np.ndarray) -> Batch:
    """Segments and positions of rows that consist of stretches with these lengths and numbers; room for weights."""
    length_S, number_S = length_S[length_S > 0], number_S[length_S > 0]
    block = buffers.empty((3, *shape), np.int32)
    block[0].reshape(-1)[:] = np.repeat(number_S.astype(np.int32), length_S)
    steps_N = block[1].reshape(-1)  # from place to place, then their sums
    steps_N[:] = 1
    steps_N[0] = 0
    steps_N[np.cumsum(length_S[:-1])] -= length_S[:-1]
    np.cumsum(steps_N, out=steps_N)
    return {"segments": block[0], "positions": block[1], "weights": block[2].view(np.float32)}
