"""A folder with a model so small that a test can write it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfra.hub.published_model import open_published, param_shapes
from tests.interop.conftest import write_tensors

VOCAB = 16
KEYS = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tiny_llama(out: Path, **keys: Any) -> Path:
    """Writes a Llama with tied embeddings and a tokenizer whose token 0 is `<end>`, others `w1` to `w15`."""
    out.mkdir()
    write_config(out, **keys)
    model, rng = open_published(str(out)), np.random.default_rng(0)
    bindings = model.family.bindings(model.config, param_shapes(model.config))
    write_tensors(out, {name: rng.normal(size=each.shape).astype("f4") for each in bindings for name in each.names})
    write_tokenizer(out, "<end>")
    return out


def tiny_chat_model(out: Path, template: str | None, *, has_tokens: bool = True) -> Path:
    """Writes a Llama of bytes that has the tokens of ChatML or not, with a chat template or without one."""
    special = ["<end>", *(["<|im_start|>", "<|im_end|>"] if has_tokens else [])]
    size = 272 if has_tokens else 257
    tiny_llama(out, vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({text: index for index, text in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    (out / "tokenizer.json").write_text(backend.to_str())
    if template is not None:
        (out / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return out


def write_config(folder: Path, **keys: Any) -> None:
    found = {name: value for name, value in (KEYS | keys).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(found))


def write_tokenizer(folder: Path, end: str) -> None:
    words = [end, *(f"w{index}" for index in range(1, VOCAB))]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(end, special=True)])
    (folder / "tokenizer.json").write_text(backend.to_str())
