"""Attention by its definition: float64, one query and one head at a time."""

import math

import numpy as np

from jaxinfra.ops.attention import See


def attention(q_BTHK, k_BSGK, v_BSGV, see: See, segments=None, q_index=None, kv_index=None) -> np.ndarray:
    q, k, v = (np.asarray(a, np.float64) for a in (q_BTHK, k_BSGK, v_BSGV))
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(K) if see.scale is None else see.scale
    out = np.zeros((B, T, H, v.shape[-1]))
    for b, i, h in np.ndindex(B, T, H):
        here = i if q_index is None else q_index[b, i]
        places = range(S) if kv_index is None else kv_index[b]
        seen = [
            j
            for j, place in enumerate(places)
            if (not see.causal or place <= here)
            and (see.window is None or place > here - see.window)
            and (segments is None or segments[0][b, i] == segments[1][b, j])
        ]
        scores = scale * k[b, seen, h // (H // G)] @ q[b, i, h]
        if see.softcap is not None:
            scores = see.softcap * np.tanh(scores / see.softcap)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, seen, h // (H // G)]
    return out
