"""`new --from` writes what tunes a published model on conversations or pairs, from a file to an export."""

import json
import random
from pathlib import Path

import pytest

from jaxinfra.config import load
from jaxinfra.prepare.documents.chat_template import PRESETS
from jaxinfra.prepare.documents.formats import Chat, Preference
from tests.interop.tiny_llama import tiny_chat_model, tiny_llama
from tests.refusals import refused
from tests.tiny_run import launch

SMALL = (
    "name=tuned",
    "train.steps=2",
    "train.global_batch=8",
    "precision.compute=float32",
    "track.console=plain",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    say = lambda: " ".join(rng.choices(["red", "green", "blue"], k=rng.randint(3, 9)))  # noqa: E731
    talks = [[{"role": "user", "content": say()}, {"role": "assistant", "content": say()}] for _ in range(400)]
    pairs = [{"prompt": say(), "chosen": say(), "rejected": say()} for _ in range(400)]
    Path("talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tiny_chat_model(tmp_path / "model", PRESETS["chatml"])
    return tmp_path


def ran(*words: str) -> str:
    assert (ended := launch(*words)).code == 0, ended
    return ended.out


@pytest.mark.slow(20)
@pytest.mark.parametrize(("data", "more"), [("talks", ()), ("pairs", ()), ("talks", ("--full",))])
def test_a_file_becomes_a_tuned_model(data: str, more: tuple[str, ...]) -> None:
    printed = ran("new", f"{data}.jsonl", "--from", "hf:model", "--name", "tuned", *more)
    run, recipe = load("configs/tuned.py").run, load("configs/data/tuned.py").run
    assert (run.adapter is None) == bool(more) and run.init == "hf:model"
    assert type(recipe.format) is (Preference if data == "pairs" else Chat)
    assert recipe.format.template.endswith("model/tokenizer_config.json")
    assert ("all parameters" if more else "a LoRA adapter") in printed
    ran("data", "prepare", "configs/data/tuned.py", "--workers", "1")
    ran("configs/tuned.py", *SMALL)
    kinds = ("",) if more else ("--adapter", "--merge")
    for kind in kinds:
        ran("hub", "export", "runs/tuned", f"out{kind}", *filter(None, [kind]))
    here = ran("sample", "runs/tuned", "red", "--max-tokens", "5", "--temperature", "0")
    assert ran("sample", f"hf:out{kinds[-1]}", "red", "--max-tokens", "5", "--temperature", "0") == here
    ran("evaluate", "runs/tuned")
    if not more:
        config = json.loads(Path("out--adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(Path("model").resolve()) and config["r"] == 16
        refused(launch("hub", "export", "runs/tuned", "other"), "runs/tuned adapter --adapter --merge")
    else:
        refused(launch("hub", "export", "runs/tuned", "other", "--adapter"), "--adapter runs/tuned no adapter")


def test_a_template_that_does_not_say_what_an_answer_is_gives_way_to_a_preset(tmp_path: Path) -> None:
    tiny_chat_model(tmp_path / "loud", "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert "template chatml" in ran("new", "talks.jsonl", "--from", "hf:loud", "--name", "loud")
    assert load("configs/data/loud.py").run.format.template == "chatml"


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "words")
    refused(launch("new", "talks.jsonl", "--from", "hf:words"), "words chat template chatml llama3 gemma")
    refused(launch("new", "talks.jsonl", "--from", "hf:nowhere"), "hf:nowhere no such folder")
    refused(launch("new", "talks.jsonl", "--full"), "--full --from")
    refused(launch("new", "pairs.jsonl"), "pairs.jsonl --from")
    assert not Path("configs").exists()
