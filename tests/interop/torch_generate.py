"""Continues random prompts with transformers, as `bench sample` asks.

Runs in an environment of its own, with torch and transformers: `python tests/interop/torch_generate.py FOLDER THREADS`
answers each line of standard input, the number of prompts, the length of each, and the number of tokens to add, with
the seconds that it took.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all texts have the same length
    generator = torch.Generator().manual_seed(0)
    for line in sys.stdin:
        rows, length, count = map(int, line.split())
        prompts = torch.randint(1, model.config.vocab_size, (rows, length), generator=generator)
        options = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
        start_s = time.perf_counter()
        with torch.inference_mode():
            texts = model.generate(prompts, max_new_tokens=count, **options)
        assert texts.shape == (rows, length + count)
        print(time.perf_counter() - start_s, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
