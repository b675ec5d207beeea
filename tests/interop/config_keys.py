"""Keys of the configs of transformers that many families have."""

from typing import Any

LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
"""The scaling of rotary positions of Llama 3.1."""


def sizes(vocab: int, hidden: int, mlp: int, layers: int, heads: int, key_heads: int) -> dict[str, int]:
    """Returns the sizes of vocabulary, residual stream and MLP, and the numbers of layers, heads and key heads."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }
