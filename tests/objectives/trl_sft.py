"""Computes SFT losses of a tiny Llama with TRL on conversations in several chat templates, and writes what it did.

Runs in an environment of its own, with torch and trl: `python tests/objectives/trl_sft.py OUT`. Writes a folder for
each template, with the tokenizer, the conversations and `sft.npz`: weights, batch, loss and gradients.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import trl
from datasets import IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

TALKS = [
    [
        ("user", "What is red?"),
        ("assistant", "A color.\nOr a wine."),
        ("user", " And blue? "),
        ("assistant", "Also."),
    ],
    [("user", "Hi"), ("assistant", "Hello, hello.")],
]
SYSTEM = ("system", "Answer in few words.")
WEATHER = {"name": "weather", "description": "The weather at a <place>.", "parameters": {"type": "object"}}
CALLS = [
    {"role": "user", "content": "Is it warm in Bern?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"place": 'the "Bern"\n', "days": 2}}}
        ],
    },
    {"role": "tool", "name": "weather", "content": '{"warm": true}'},
    {"role": "assistant", "content": "Yes."},
]
REASONING = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Two and two\nmake four."},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "<think>\nThree twice.\n</think>\n\n6"},
]
WITH = {  # the conversations that a template has a place for, beside TALKS
    "llama3_training": ("system",),
    "phi3_training": ("system",),
    "qwen3_training": ("system", "tools", "reasoning"),
    "glm4moe_training": ("system", "tools", "reasoning"),
    "deepseekv3_training": ("system", "calls"),  # it writes calls of tools, but not their schemas
}


def conversations(kinds: tuple[str, ...]) -> list[dict]:
    talks = [*TALKS, [SYSTEM, *TALKS[0]]] if "system" in kinds else TALKS
    rows: list[dict] = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    if "tools" in kinds:
        rows.append({"messages": CALLS, "tools": json.dumps([{"type": "function", "function": WEATHER}])})
    if "calls" in kinds:
        rows.append({"messages": CALLS})
    return [*rows, {"messages": REASONING}] if "reasoning" in kinds else rows


def tokenizer_of(template: str, texts: list[str]) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", *dict.fromkeys(re.findall(r"<[|｜/]?[\w▁]+[|｜]?>|\[gMASK\]", template))]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def main(out: str) -> None:
    for name, kinds in WITH.items():
        template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
        rows = conversations(kinds)
        tokenizer = tokenizer_of(template, [json.dumps(row, ensure_ascii=False) for row in rows])
        folder = Path(out) / name
        tokenizer.save_pretrained(folder)
        (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            initializer_range=0.3,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
        model = LlamaForCausalLM(config).float()
        with tempfile.TemporaryDirectory() as folder_of_run:
            arguments = SFTConfig(
                output_dir=folder_of_run,
                assistant_only_loss=True,
                loss_type="nll",
                per_device_train_batch_size=len(rows),
                max_length=None,
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                shuffle_dataset=False,
                max_steps=1,
            )
            # A table would give each message the fields of all others.
            data = IterableDataset.from_generator(lambda rows=rows: iter(rows))
            trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
            inputs = next(iter(trainer.get_train_dataloader()))
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, dict(inputs))
            loss.backward()
        arrays = {"loss": loss.detach().numpy()}
        arrays |= {f"batch.{field}": value.numpy() for field, value in inputs.items()}
        arrays |= {f"grad.{field}": p.grad.numpy() for field, p in trainer.model.named_parameters()}
        arrays |= {f"trained.{field}": p.detach().numpy() for field, p in trainer.model.named_parameters()}
        np.savez(folder / "sft.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
