"""From a row of consecutive tokens to what a language model is trained on, in NumPy.

A split is cut into windows of `seq_len + 1` tokens that start every `seq_len` tokens, so every token but the
first is a target exactly once. Nothing is padded or dropped but the tail shorter than one window.

Shape suffixes: B rows, T positions, W = T + 1 tokens of a window.
"""

import numpy as np

from jaxinfra.data.contract import Batch


def window_count(tokens: int, seq_len: int) -> int:
    """How many whole windows a split of so many tokens has."""
    return max(0, (tokens - 1) // seq_len)


def split_inputs_targets(window_BW: np.ndarray, *, eot_id: int, mask_documents: bool) -> Batch:
    """Makes a batch of windows.

    Args:
        window_BW: token ids.
        eot_id: the token that ends a document and belongs to it.
        mask_documents: whether documents that share a window are kept apart.

    Returns:
        `inputs` and `targets`, int32[B, T]. With `mask_documents` also
        `segments`, int32[B, T]: number of the document in the window, from 1;
        `positions`, int32[B, T]: position in the document, or in its part that the window has, from 0;
        `weights`, float32[B, T]: 0 where input and target are of two documents, else 1.
    """
    ids_BW = window_BW.astype(np.int32)
    input_BT, target_BT = ids_BW[:, :-1], ids_BW[:, 1:]
    batch = {"inputs": input_BT, "targets": target_BT}
    if mask_documents:
        ends_BT = input_BT == eot_id
        starts_BT = np.zeros_like(ends_BT)
        starts_BT[:, 1:] = ends_BT[:, :-1]
        step_T = np.arange(input_BT.shape[1], dtype=np.int32)
        batch["segments"] = 1 + np.cumsum(starts_BT, axis=1, dtype=np.int32)
        batch["positions"] = step_T - np.maximum.accumulate(np.where(starts_BT, step_T, 0), axis=1)
        batch["weights"] = np.where(ends_BT, np.float32(0), np.float32(1))
    return batch
