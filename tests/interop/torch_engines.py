"""Continues a prompt greedily with engines that load an export: `torch_engines.py FOLDER PROMPT COUNT`, prints JSON."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import ctranslate2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def with_transformers(folder: str, ids: list[int], count: int) -> tuple[list[int], list[str]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    prompt = torch.tensor([ids])
    options = {"max_new_tokens": count, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    return model.generate(prompt, **options)[0, len(ids) :].tolist(), [str(each) for each in info.values() if each]


def with_ctranslate2(folder: str, tokens: list[str], count: int) -> list[int]:
    out = f"{folder}-ct2"
    converter = Path(sys.executable).with_name("ct2-transformers-converter")
    subprocess.run([converter, "--model", folder, "--output_dir", out], check=True, capture_output=True)
    options = {"max_length": count, "sampling_topk": 1, "include_prompt_in_result": False}
    return ctranslate2.Generator(out).generate_batch([tokens], **options)[0].sequences_ids[0]


def with_server(folder: str, prompt: str, count: int) -> str:
    """The text of `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        body = {"model": folder, "prompt": prompt, "max_tokens": count, "temperature": 0}
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["choices"][0]["text"]
    finally:
        server.kill()
        server.wait()


def main() -> None:
    folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt).input_ids  # with the tokens that stand before a text, if there are some
    tokens, problems = with_transformers(folder, ids, count)
    found = {
        "problems": problems,
        "transformers": tokenizer.decode(tokens),
        "ctranslate2": tokenizer.decode(with_ctranslate2(folder, tokenizer.convert_ids_to_tokens(ids), count)),
        "transformers serve": with_server(folder, prompt, count),
    }
    print(json.dumps(found))


main()
