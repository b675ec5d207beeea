"""A folder with a model so small that a test can write it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, models, pre_tokenizers
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


def tiny_llama(out: Path) -> Path:
    """Writes a Llama with tied embeddings and a tokenizer whose token 0 is `<end>`, others `w1` to `w15`."""
    out.mkdir()
    write_config(out)
    model, rng = open_published(str(out)), np.random.default_rng(0)
    bindings = model.family.bindings(model.config, param_shapes(model.config))
    write_tensors(out, {name: rng.normal(size=each.shape).astype("f4") for each in bindings for name in each.names})
    write_tokenizer(out, "<end>")
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
