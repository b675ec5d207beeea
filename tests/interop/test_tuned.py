"""The configs that tune published models, from a folder of transformers to one that transformers continues alike."""

import io
import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.cli.test_tune import ran
from tests.interop.torch_python import TORCH_PYTHON, needs_torch

CONFIGS = Path(__file__).parents[2] / "configs"
SCRIPT = Path(__file__).with_name("torch_chat.py")
WRAPPER = """
from dataclasses import replace
from runpy import run_path

from jaxinfra.hub import published


def config():
    run = run_path({path!r})["config"]()
    data = replace(run.data, store="stores/{name}", recipe=None, seq_len=128)
    return replace(run, model=published({base!r}), data=data)
"""


@needs_torch
@pytest.mark.slow(60)
def test_configs_tune_models_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SFT, DPO from what it has made, LoRA and QLoRA."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([TORCH_PYTHON, SCRIPT, "make", "."], check=True, capture_output=True)
    rng = random.Random(0)
    say = lambda: " ".join(rng.choices(["red", "green", "blue"], k=rng.randint(3, 9)))  # noqa: E731
    talks = [[{"role": "user", "content": say()}, {"role": "assistant", "content": say()}] for _ in range(300)]
    pairs = [{"prompt": say(), "chosen": say(), "rejected": say()} for _ in range(300)]
    for name, rows in (("chats", [{"messages": talk} for talk in talks]), ("pairs", pairs)):
        Path(name).mkdir()
        Path(f"{name}/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    here = {}
    for name, recipe, family, init in (
        ("sft", "chats_qwen3", "qwen3", "hf:qwen3"),
        ("dpo", "pairs_qwen3", "qwen3", "runs/sft"),
        ("lora", "chats_llama3", "llama3", "hf:llama3"),
        ("qlora_70b", "chats_llama3", "llama3", "hf:llama3"),
    ):
        packs = () if name == "dpo" else ("packs.0.seq_len=128",)
        words = (f"store=stores/{name}", f"tokenizer.path={family}/tokenizer.json", *packs)
        ran("data", "prepare", str(CONFIGS / f"data/{recipe}.py"), *words, "--workers", "1")
        Path(f"{name}.py").write_text(WRAPPER.format(path=str(CONFIGS / f"{name}.py"), name=name, base=f"hf:{family}"))
        train = ("train.steps=2", "train.global_batch=8", "train.accumulate=1", "optim.schedule.warmup_steps=1")
        ran(f"{name}.py", f"init={init}", f"name={name}", "precision.compute=float32", "track.console=plain", *train)
        ran("hub", "export", f"runs/{name}", f"out/{name}", *(["--merge"] if "lora" in name else []))
        monkeypatch.setattr("sys.stdin", io.StringIO("red blue\n"))
        here[name] = ran("chat", f"runs/{name}", "--max-tokens", "12", "--temperature", "0").removesuffix("\n")
    folders = [f"out/{name}" for name in here]
    done = subprocess.run(
        [TORCH_PYTHON, SCRIPT, "answer", "red blue", *folders], check=True, capture_output=True, text=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [*here.values()]
