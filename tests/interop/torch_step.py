"""The train step of the baseline's model in PyTorch, as its users write one.

Runs in an environment of its own: `python tests/interop/torch_step.py CONFIG MODE [PARAMS]` makes a step for each line
of standard input, and answers with its seconds and its loss. CONFIG is a `BaselineConfig` in JSON, MODE is eager or
compile, PARAMS a file of the baseline's parameters (`numpy.savez`), random ones without it.

Shape suffixes: B batch, T sequence length, D hidden size, H heads, K head dim, V vocabulary.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Layer(nn.Module):
    """Attention and MLP of a Llama."""

    def __init__(self, config):
        super().__init__()
        D, F = config["hidden_size"], config["mlp_dim"]
        self.num_heads = config["num_heads"]
        self.attention_norm = nn.RMSNorm(D, eps=config["norm_eps"])
        self.mlp_norm = nn.RMSNorm(D, eps=config["norm_eps"])
        self.query, self.key, self.value, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((D, F), (D, F), (F, D)))

    def forward(self, x_BTD, cos, sin):
        h = self.attention_norm(x_BTD)
        split = (*h.shape[:2], self.num_heads, -1)
        q, k, v = (linear(h).view(split).transpose(1, 2) for linear in (self.query, self.key, self.value))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attention.transpose(1, 2).reshape(h.shape))
        h = self.mlp_norm(x_BTD)
        return x_BTD + self.down(functional.silu(self.gate(h)) * self.up(h))


def rotate(x_BHTK, cos, sin):
    a, b = x_BHTK.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Llama(nn.Module):
    """Computes the mean cross-entropy of the next token."""

    def __init__(self, config):
        super().__init__()
        D, V, half = config["hidden_size"], config["vocab_size"], config["hidden_size"] // config["num_heads"] // 2
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        self.norm = nn.RMSNorm(D, eps=config["norm_eps"])
        self.head = nn.Linear(D, V, bias=False)
        positions = torch.arange(config["seq_len"])[:, None]
        angles = positions * config["rope_theta"] ** -(torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens_BW):
        x_BTD = self.embedding(tokens_BW[:, :-1])
        cos, sin = self.cos.to(x_BTD.dtype), self.sin.to(x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos, sin)
        logits_BTV = self.head(self.norm(x_BTD)).float()
        return functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BW[:, 1:].flatten())


def load(model, params):
    """Takes the parameters of the baseline, whose matrices are [in, out], with the layers first."""
    named = {"embedding.weight": params["embedding"], "norm.weight": params["norm"], "head.weight": params["head"].T}
    for name, arrays in params.items():
        if name in ("embedding", "norm", "head"):
            continue
        for index, array in enumerate(arrays):
            matrix = array.reshape(-1, array.shape[-1]) if name == "out" else array.reshape(len(array), -1)
            named[f"layers.{index}.{name}.weight"] = array if name.endswith("norm") else matrix.T
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in named.items()})


def main(text, mode, path=None):
    config = json.loads(text)
    torch.manual_seed(0)
    model = Llama(config)
    if path is not None:
        load(model, np.load(path))
    betas, decay = (0.9, 0.95), config["weight_decay"]
    optimizer = torch.optim.AdamW(model.parameters(), config["peak_lr"], betas, weight_decay=decay, fused=True)
    loss_of = torch.compile(model) if mode == "compile" else model
    shape = (config["batch_size"], config["seq_len"] + 1)
    tokens_BW = torch.from_numpy(np.random.default_rng(0).integers(0, config["vocab_size"], shape))
    dtype = getattr(torch, config["compute_dtype"])
    for _ in sys.stdin:
        start_s = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(tokens_BW)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(loss.detach())
        print(time.perf_counter() - start_s, loss, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
