"""A mixture of experts in NumPy: float64, one token, one expert at a time, straight from the papers.

It shares only the names of config fields and parameters with the package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

type Mlp = Callable[[np.ndarray, dict[str, Any]], np.ndarray]


@dataclass
class ExpertStats:
    """Sums over the tokens of some sequences; `load` has the choices of each expert, one entry a layer."""

    load: list[np.ndarray] = field(default_factory=list)
    served: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0


def scores_of(logits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    exp = np.exp(logits - logits.max())
    return exp / exp.sum()


def top_k(values: np.ndarray, count: int) -> list[int]:
    """Returns the indices of the largest values; of equal ones the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def choices(scores: np.ndarray, bias: np.ndarray | None, config: Any) -> list[int]:
    biased = scores if bias is None else scores + bias
    size = config.num_experts // config.num_groups
    groups = biased.reshape(config.num_groups, size)
    allowed_groups = range(config.num_groups)
    if config.top_k_groups < config.num_groups:
        allowed_groups = top_k(np.array([np.sort(group)[-2:].sum() for group in groups]), config.top_k_groups)
    allowed = [e for e in range(config.num_experts) if e // size in allowed_groups]
    return [allowed[i] for i in top_k(biased[allowed], config.top_k)]


def mixture(x_TD: np.ndarray, params: dict[str, Any], config: Any, mlp: Mlp, stats: ExpertStats) -> np.ndarray:
    """Applies one layer to one sequence; `mlp(x_D, weights)` is one expert."""
    T = len(x_TD)
    capacity = (
        T
        if config.capacity_factor is None
        else math.ceil(config.capacity_factor * T * config.top_k / config.num_experts)
    )
    y_TD, load, taken = np.zeros_like(x_TD), np.zeros(config.num_experts), np.zeros(config.num_experts)
    shares = np.zeros(config.num_experts)
    for t, x_D in enumerate(x_TD):
        logits = x_D @ params["router"] + params.get("router_bias", 0.0)
        scores = scores_of(logits, config.score_function)
        chosen = choices(scores, params.get("bias"), config)
        total = scores[chosen].sum() if config.normalize_weights else 1.0
        for e in chosen:
            load[e] += 1
            if taken[e] == capacity:
                continue
            taken[e] += 1
            weights = {name: {"weight": params[name][e]} for name in ("gate", "up", "down") if name in params}
            for name, own in weights.items():
                own["bias"] = params[f"{name}_bias"][e] if config.bias else 0.0
            weight = config.routed_scaling_factor * scores[e] / total
            y_TD[t] += mlp(weight * x_D, weights) if config.scale_inputs else weight * mlp(x_D, weights)
        if config.num_shared_experts:
            gate = 1 / (1 + np.exp(-x_D @ params["shared_gate"])) if config.shared_gate else 1.0
            y_TD[t] += gate * mlp(x_D, params["shared"])
        shares += scores / scores.sum()
        stats.z_loss += config.z_loss * np.log(np.exp(logits).sum()) ** 2
    f, p = load * config.num_experts / (config.top_k * T), shares / T
    stats.balance_loss += config.balance_loss * T * (f * p).sum()
    stats.load.append(load)
    stats.served += taken.sum()
    return y_TD
