"""Computes losses of a tiny Llama with TRL, and writes weights, batches, losses and gradients to an .npz file.

Runs in an environment of its own, with torch and trl: `python tests/objectives/trl_dpo.py OUT.npz`.
"""

import sys
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

VOCAB, PAIRS, BETA = 32, 6, 0.5


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
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
    return LlamaForCausalLM(config).float()


def main(out: str) -> None:
    vocabulary = {f"w{n}": n for n in range(VOCAB - 2)} | {"<pad>": VOCAB - 2, "<eos>": VOCAB - 1}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"w{n}" for n in rng.integers(0, VOCAB - 2, length))

    rows = [
        {"prompt": text(3) + " ", "chosen": text(int(rng.integers(2, 8))), "rejected": text(int(rng.integers(2, 8)))}
        for _ in range(PAIRS)
    ]
    arrays = {"beta": BETA}
    for loss_type in ("sigmoid", "sigmoid_norm", "ipo"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                output_dir=folder,
                beta=BETA,
                loss_type=[loss_type],
                per_device_train_batch_size=PAIRS,
                max_length=None,
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_dropout=True,
            )
            trainer = DPOTrainer(
                model=model(0),
                ref_model=model(1),
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            inputs = next(iter(trainer.get_train_dataloader()))
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, dict(inputs))
            loss.backward()
        arrays |= {f"{loss_type}.loss": loss.detach().numpy()}
        arrays |= {f"{loss_type}.batch.{name}": value.numpy() for name, value in inputs.items()}
        arrays |= {f"{loss_type}.grad.{name}": p.grad.numpy() for name, p in trainer.model.named_parameters()}
    shared: dict[str, Any] = {
        "beta": BETA,
        "per_device_train_batch_size": PAIRS,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
    }
    unpaired = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": bool(n % 3)}
        for n, row in enumerate(rows)
    ]
    weights_of_labels = {"desirable_weight": 1.5, "undesirable_weight": 0.8}
    for name, make in {
        "orpo": lambda folder: ORPOTrainer(
            model=model(0),
            args=ORPOConfig(output_dir=folder, max_length=64, **shared),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        ),
        "kto": lambda folder: KTOTrainer(
            model=model(1),  # the other way round, the KL estimate is below 0, and TRL cuts it off
            ref_model=model(0),
            args=KTOConfig(output_dir=folder, max_length=None, **weights_of_labels, **shared),
            train_dataset=Dataset.from_list(unpaired),
            processing_class=tokenizer,
        ),
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            other = make(folder)
            inputs = next(iter(other.get_train_dataloader()))
            other.model.train()
            loss = other.compute_loss(other.model, dict(inputs))
            loss.backward()
            if name == "orpo":
                inputs = other.concatenated_inputs(inputs, padding_value=tokenizer.pad_token_id)
        arrays |= {f"{name}.loss": loss.detach().numpy()}
        arrays |= {f"{name}.batch.{key}": np.asarray(v) for key, v in inputs.items() if isinstance(v, torch.Tensor)}
        arrays |= {f"{name}.grad.{key}": p.grad.numpy() for key, p in other.model.named_parameters()}
    for role, weights in (("trained", trainer.model), ("reference", trainer.ref_model)):
        arrays |= {f"{role}.{name}": p.detach().numpy() for name, p in weights.named_parameters()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
