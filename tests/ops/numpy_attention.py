"""Attention by its definition: float64, one query and one head at a time."""

import math

import numpy as np

from jaxinfra.ops.attention import AttentionSpec


def attention(
    q_BTHK: np.ndarray,
    k_BSGK: np.ndarray,
    v_BSGV: np.ndarray,
    spec: AttentionSpec,
    segments: tuple[np.ndarray, np.ndarray] | None = None,
    positions: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    q, k, v = (np.asarray(a, np.float64) for a in (q_BTHK, k_BSGK, v_BSGV))
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(K) if spec.scale is None else spec.scale
    q_positions, kv_positions = positions or (np.tile(np.arange(n), (B, 1)) for n in (T, S))
    out = np.zeros((B, T, H, v.shape[-1]))
    for b, i, h in np.ndindex(B, T, H):
        position = q_positions[b, i]
        keys = [
            j
            for j, kv_position in enumerate(kv_positions[b])
            if (not spec.causal or kv_position <= position)
            and (spec.window is None or kv_position > position - spec.window)
            and (segments is None or segments[0][b, i] == segments[1][b, j])
        ]
        scores = scale * k[b, keys, h // (H // G)] @ q[b, i, h]
        if spec.softcap is not None:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, keys, h // (H // G)]
    return out
