"""The decoder in NumPy: float64, one token, one head, one layer at a time, straight from the definitions.

It shares only the names of config fields and parameters with the package.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from tests.models.numpy_experts import ExpertStats, mixture

Params = dict[str, Any]


def normalize(x: np.ndarray, params: Params, kind: str, eps: float, offset: float) -> np.ndarray:
    if kind == "rmsnorm":
        return x / math.sqrt((x**2).mean() + eps) * (offset + params["scale"])
    return (x - x.mean()) / math.sqrt(x.var() + eps) * params["scale"] + params["bias"]


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    """GELU by the tanh formula of Hendrycks and Gimpel 2016: what GPT-2 and Gemma use."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def frequency(pair: int, rotated: int, rope: Any) -> float:
    base = rope.theta ** (-2 * pair / rotated)
    scaling = rope.scaling
    if scaling is None:
        return base
    if type(scaling).__name__ == "LinearScaling":
        return base / scaling.factor
    if type(scaling).__name__ == "LongRopeScaling":
        return base / scaling.divisors[pair]
    if type(scaling).__name__ == "YarnScaling":
        return yarn(base, pair, rotated, rope)
    wavelength = 2 * math.pi / base
    if wavelength < scaling.original_length / scaling.high_freq_factor:
        return base
    if wavelength > scaling.original_length / scaling.low_freq_factor:
        return base / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_length / wavelength - low) / (high - low)
    return (1 - smooth) * base / scaling.factor + smooth * base


def yarn(base: float, pair: int, rotated: int, rope: Any) -> float:
    """By DeepSeek-V3's published model: the ramp is over the numbers of pairs, its ends are whole numbers."""
    s = rope.scaling
    ends = [
        rotated * math.log(s.original_length / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
        for beta in (s.beta_fast, s.beta_slow)
    ]
    if s.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], rotated - 1)
    interpolated = min(max((pair - low) / (high - low), 0), 1)
    return base / s.factor * interpolated + base * (1 - interpolated)


def mscale(rope: Any, name: str) -> float:
    """YaRN's factor for longer contexts: 1 without YaRN."""
    if type(rope.scaling).__name__ != "YarnScaling":
        return 1.0
    return 0.1 * getattr(rope.scaling, name) * math.log(rope.scaling.factor) + 1


def rotate(x: np.ndarray, position: int, rope: Any) -> np.ndarray:
    """One head at one position: features i and i + rotated/2 are one complex number, turned."""
    rotated = int(len(x) * rope.fraction)
    half = rotated // 2
    turned = x.copy()
    for i in range(half):
        z = complex(x[i], x[i + half]) * np.exp(1j * position * frequency(i, rotated, rope))
        z *= mscale(rope, "mscale") / mscale(rope, "mscale_all_dim")
        if type(rope.scaling).__name__ == "LongRopeScaling":
            z *= math.sqrt(1 + math.log(rope.scaling.factor) / math.log(rope.scaling.original_length))
        turned[i], turned[i + half] = z.real, z.imag
    return turned


def rope_of_document(rope: Any, token: int, segments: np.ndarray | None, length: int) -> Any:
    """LongRoPE has other divisors for documents up to the original length; a row without segments is one document."""
    length = length if segments is None else (segments == segments[token]).sum()
    if not getattr(rope.scaling, "short_divisors", ()) or length > rope.scaling.original_length:
        return rope
    return replace(rope, scaling=replace(rope.scaling, divisors=rope.scaling.short_divisors))


def linear(x: np.ndarray, params: Params, in_dims: int) -> np.ndarray:
    return np.tensordot(x, params["weight"], axes=in_dims) + params.get("bias", 0.0)


def dot_product_attention(q_THK, k_TGK, v_TGV, mixer, positions, segments, sinks_H=None) -> np.ndarray:
    T, H, K = q_THK.shape
    group_of = H // k_TGK.shape[1]
    window, rope = mixer.window, mixer.rope
    scale = 1 / math.sqrt(K) if mixer.query_scale is None else mixer.query_scale
    scale *= 1.0 if rope is None else mscale(rope, "mscale_all_dim") ** 2
    out = np.zeros((T, H, v_TGV.shape[-1]))
    for i in range(T):
        keys = [j for j in range(i + 1) if window is None or i - j < window]
        keys = [j for j in keys if segments is None or segments[i] == segments[j]]
        if getattr(mixer, "chunk", None) is not None:
            keys = [j for j in keys if positions[i] // mixer.chunk == positions[j] // mixer.chunk]
        for h in range(H):
            scores = np.array([scale * (q_THK[i, h] @ k_TGK[j, h // group_of]) for j in keys])
            if mixer.softcap is not None:
                scores = mixer.softcap * np.tanh(scores / mixer.softcap)
            weights = np.exp(scores - scores.max())
            sink = 0 if sinks_H is None else np.exp(sinks_H[h] - scores.max())
            weights /= weights.sum() + sink
            out[i, h] = sum(w * v_TGV[j, h // group_of] for w, j in zip(weights, keys, strict=True))
    return out


def latent_attention(x_TD, params: Params, config, mixer, positions, segments) -> np.ndarray:
    """Equations 37 to 47 of the DeepSeek-V2 paper, one head at a time, in their order; rotated features first."""
    rope, P = mixer.rope, mixer.qk_rope_head_dim
    eps = config.norm.eps if mixer.norm_eps is None else mixer.norm_eps
    q_in_TR = x_TD
    if "query_down" in params:
        q_in_TR = [
            normalize(c, params["query_norm"], "rmsnorm", eps, config.norm.offset)
            for c in linear(x_TD, params["query_down"], 1)
        ]
    latent_TR = np.stack(
        [
            normalize(c, params["kv_norm"], "rmsnorm", eps, config.norm.offset)
            for c in linear(x_TD, params["kv_down"], 1)
        ]
    )
    shared_TP = [rotate(k, t, rope) for k, t in zip(linear(x_TD, params["rotated_key"], 1), positions, strict=True)]
    heads = []
    for h in range(mixer.num_heads):
        q_TK = np.stack(q_in_TR) @ params["query"]["weight"][:, h]
        q_TK[:, :P] = [rotate(q, t, rope) for q, t in zip(q_TK[:, :P], positions, strict=True)]
        k_TN, v_TV = (latent_TR @ params[name]["weight"][:, h] for name in ("key", "value"))
        heads.append((q_TK, np.concatenate([shared_TP, k_TN], 1), v_TV))
    q_THK, k_THK, v_THV = (np.stack(arrays, axis=1) for arrays in zip(*heads, strict=True))
    return linear(dot_product_attention(q_THK, k_THK, v_THV, mixer, positions, segments), params["out"], 2)


def attention(x_TD, params: Params, config, mixer, positions, segments) -> np.ndarray:
    if "a_log" in params:
        return gated_delta_net(x_TD, params, config, mixer, segments)
    if "kv_down" in params:
        return latent_attention(x_TD, params, config, mixer, positions, segments)
    q_THK, k_TGK, v_TGK = (linear(x_TD, params[name], 1) for name in ("query", "key", "value"))
    for name, x_THK in (("query_norm", q_THK), ("key_norm", k_TGK)):
        if mixer.qk_norm == "all":
            for t in range(len(x_THK)):
                scale = {"scale": params[name]["scale"].ravel()}
                normed = normalize(x_THK[t].ravel(), scale, "rmsnorm", config.norm.eps, config.norm.offset)
                x_THK[t] = normed.reshape(x_THK[t].shape)
        for t, h in np.ndindex(x_THK.shape[:2]):
            if mixer.qk_norm == "l2":
                x_THK[t, h] = normalize(x_THK[t, h], {"scale": 1.0}, "rmsnorm", config.norm.eps, 0.0)
            if mixer.qk_norm == "head":
                x_THK[t, h] = normalize(x_THK[t, h], params[name], "rmsnorm", config.norm.eps, config.norm.offset)
            if mixer.rope is not None:
                rope = rope_of_document(mixer.rope, t, segments, len(positions))
                x_THK[t, h] = rotate(x_THK[t, h], positions[t], rope)
    if mixer.temperature is not None:
        for t, position in enumerate(positions):
            q_THK[t] *= 1 + mixer.temperature.scale * math.log(1 + (position + 1) // mixer.temperature.floor)
    y_THK = dot_product_attention(q_THK, k_TGK, v_TGK, mixer, positions, segments, params.get("sinks"))
    if mixer.gate:
        y_THK = y_THK / (1 + np.exp(-linear(x_TD, params["gate"], 1)))
    return linear(y_THK, params["out"], 2)


def convolution(x_T, weight_W, segments) -> np.ndarray:
    """A causal convolution of one feature with the inputs of the same document, and SiLU."""
    width, out = len(weight_W), np.zeros(len(x_T))
    for t in range(len(x_T)):
        for back in range(min(width, t + 1)):
            if segments is None or segments[t - back] == segments[t]:
                out[t] += weight_W[width - 1 - back] * x_T[t - back]
    return silu(out)


def gated_delta_net(x_TD, params: Params, config, mixer, segments) -> np.ndarray:
    """Equation 10 of Yang et al. 2024, one token at a time."""
    q_TGK, k_TGK, v_THV = (linear(x_TD, params[name], 1) for name in ("query", "key", "value"))
    for name, x_THK in (("query", q_TGK), ("key", k_TGK), ("value", v_THV)):
        for h, i in np.ndindex(x_THK.shape[1:]):
            x_THK[:, h, i] = convolution(x_THK[:, h, i], params[f"{name}_conv"][:, h, i], segments)
    softplus = np.log1p(np.exp(linear(x_TD, params["decay"], 1) + params["dt_bias"]))
    decay_TH = np.exp(-np.exp(params["a_log"]) * softplus)
    beta_TH = 1 / (1 + np.exp(-linear(x_TD, params["beta"], 1)))
    out = np.zeros_like(v_THV)
    for h in range(mixer.num_value_heads):
        state_VK = np.zeros((mixer.value_head_dim, mixer.key_head_dim))
        group = h * mixer.num_key_heads // mixer.num_value_heads
        for t in range(len(x_TD)):
            if segments is not None and t and segments[t] != segments[t - 1]:
                state_VK = np.zeros_like(state_VK)
            q, k = (x / math.sqrt(x @ x + 1e-6) for x in (q_TGK[t, group], k_TGK[t, group]))
            state_VK = decay_TH[t, h] * state_VK @ (np.eye(len(k)) - beta_TH[t, h] * np.outer(k, k))
            state_VK += beta_TH[t, h] * np.outer(v_THV[t, h], k)
            out[t, h] = normalize(state_VK @ q / math.sqrt(len(q)), params["norm"], "rmsnorm", config.norm.eps, 0.0)
    return linear(out * silu(linear(x_TD, params["gate"], 1)), params["out"], 2)


def mlp(x_TD: np.ndarray, params: Params, kind: str) -> np.ndarray:
    hidden = linear(x_TD, params["up"], 1)
    if kind == "gelu":
        return linear(tanh_gelu(hidden), params["down"], 1)
    if kind == "clamped_swiglu":
        gate, hidden = np.minimum(linear(x_TD, params["gate"], 1), 7), np.clip(hidden, -7, 7)
        return linear(gate / (1 + np.exp(-1.702 * gate)) * (hidden + 1), params["down"], 1)
    act = {"swiglu": silu, "geglu": tanh_gelu}[kind]
    return linear(act(linear(x_TD, params["gate"], 1)) * hidden, params["down"], 1)


def mlp_or_experts(x_TD: np.ndarray, params: Params, config, stats: ExpertStats) -> np.ndarray:
    if "router" not in params:
        return mlp(x_TD, params, config.activation)
    return mixture(x_TD, params, config, lambda x, weights: mlp(x, weights, config.activation), stats)


def norm_rows(x_TD: np.ndarray, weights: Params, config) -> np.ndarray:
    return np.stack([normalize(x, weights, config.norm.type, config.norm.eps, config.norm.offset) for x in x_TD])


def decode_row(params: Params, config, tokens, positions, segments, stats: ExpertStats) -> np.ndarray:
    """Returns the hidden states `[T, D]` of one row after the final norm; adds to `stats`."""
    x_TD = np.stack([params["embedding"][t] for t in tokens])
    if config.learned_positions:
        x_TD = x_TD + np.stack([params["positions"][p] for p in positions])
    if config.scale_embeddings:
        x_TD = x_TD * math.sqrt(config.hidden_size)
    x_TD = x_TD * config.embedding_multiplier
    for layer, weights in zip(config.all_layers, weights_of_layers(params, config), strict=True):
        x_TD = apply_layer(x_TD, weights, config, layer, positions, segments, stats)
    return norm_rows(x_TD, params["norm"], config)


def apply_layer(x_TD, weights: Params, config, layer, positions, segments, stats: ExpertStats) -> np.ndarray:
    before, after = layer.norms != "after", layer.norms != "before"
    y_TD = norm_rows(x_TD, weights["attention_norm"], config) if before else x_TD
    y_TD = attention(y_TD, weights["attention"], config, layer.mixer, positions, segments)
    y_TD = norm_rows(y_TD, weights["attention_post_norm"], config) if after else y_TD
    x_TD = x_TD + config.residual_multiplier * y_TD
    y_TD = norm_rows(x_TD, weights["mlp_norm"], config) if before else x_TD
    y_TD = mlp_or_experts(y_TD, weights["mlp"], layer.mlp, stats)
    return x_TD + config.residual_multiplier * (norm_rows(y_TD, weights["mlp_post_norm"], config) if after else y_TD)


def weights_of_layers(params: Params, config) -> list[Params]:
    """The parameters of each layer, from those of the prefix, the whole periods and the rest."""
    found = []
    for name in ("prefix", "blocks", "tail"):
        stacked = params.get(name, {})
        period = [stacked] if "mlp" in stacked else [stacked[f"layer_{i}"] for i in range(len(stacked))]
        times = len(any_array(stacked)) if stacked else 0
        found += [at_layer(weights, number) for number in range(times) for weights in period]
    return found


def any_array(tree: Params) -> np.ndarray:
    """Any array of a tree."""
    return tree if not isinstance(tree, dict) else any_array(next(iter(tree.values())))


def at_layer(stacked: Params, number: int) -> Params:
    return {
        name: at_layer(value, number) if isinstance(value, dict) else value[number] for name, value in stacked.items()
    }


def as_float64(params: Params) -> Params:
    return {
        name: as_float64(value) if isinstance(value, dict) else np.asarray(value, np.float64)
        for name, value in params.items()
    }


def logits(params: Params, config, tokens, positions=None, segments=None, stats=None) -> np.ndarray:
    """Returns logits `[B, T, V]` before the soft cap; adds to `stats`."""
    params, stats = as_float64(params), stats or ExpertStats()
    head = params["embedding"].T if config.tie_embeddings else params["unembedding"]
    rows = []
    for b, row in enumerate(np.asarray(tokens)):
        row_positions = np.arange(len(row)) if positions is None else positions[b]
        row_segments = None if segments is None else segments[b]
        rows.append(decode_row(params, config, row, row_positions, row_segments, stats) @ head / config.logits_scaling)
    return np.stack(rows)


def entropies(logits_BTV: np.ndarray, targets_BT: np.ndarray, softcap: float | None) -> np.ndarray:
    """`-log softmax(capped logits)[target]`, `[B, T]`."""
    if softcap is not None:
        logits_BTV = softcap * np.tanh(logits_BTV / softcap)
    exp = np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True))
    probabilities = exp / exp.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(probabilities, targets_BT[..., None], -1)[..., 0])
