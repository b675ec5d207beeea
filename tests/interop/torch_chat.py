"""A tiny model with a tokenizer and a chat template, made by transformers, and answers of models by transformers.

`torch_chat.py make OUT` writes a Qwen3 and a Llama, `torch_chat.py answer TEXT FOLDER...` prints the greedy answers of
models to a user's message, one JSON string a line.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "dtype": "float32",
}
KINDS = {
    "qwen3": (Qwen3Config, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]),
    "llama3": (
        LlamaConfig,
        "<|end_of_text|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
}


def make(out: Path) -> None:
    for name, (config, end, special) in KINDS.items():
        torch.manual_seed(0)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({text: index for index, text in enumerate([end, *special, *letters])}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([end, *special])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
        model = AutoModelForCausalLM.from_config(config(vocab_size=-(-len(tokenizer) // 8) * 8, head_dim=8, **SIZES))
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def answer(text: str, folders: list[str]) -> None:
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        talk = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
        print(json.dumps(tokenizer.decode(found, skip_special_tokens=True)))


if sys.argv[1] == "make":
    make(Path(sys.argv[2]))
else:
    answer(sys.argv[2], sys.argv[3:])
