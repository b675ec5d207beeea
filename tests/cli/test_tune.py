"""`new --from` writes what tunes a published model on conversations or pairs, from a file to an export."""

import io
import json
import random
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfra.config import load
from jaxinfra.inference.trained_params import load_params
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.prepare.documents.chat_template import PRESETS, ChatTemplate
from jaxinfra.prepare.documents.formats import Chat, Completion, Labeled
from jaxinfra.processes.peers import current_peers
from jaxinfra.program import Program
from tests.interop.conftest import read_tensors
from tests.interop.tiny_llama import tiny_chat_model, tiny_llama
from tests.refusals import refused
from tests.tiny_run import launch

BASE = "hf:model"
SMALL = (
    "name=mychat",
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
    labeled = [{"prompt": say(), "completion": say(), "label": bool(n % 3)} for n in range(200)]
    Path("labeled.jsonl").write_text("".join(json.dumps(each) + "\n" for each in labeled))
    Path("talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tiny_chat_model(tmp_path / "model", PRESETS["chatml"])
    return tmp_path


def answers(data: str) -> set[str]:
    """Returns the texts that are trained on."""
    rows = [json.loads(line) for line in Path(f"{data}.jsonl").read_text().splitlines()]
    if data == "talks":
        return {row["messages"][1]["content"] for row in rows}
    return {row["completion"] for row in rows}


def ran(*words: str) -> str:
    assert (ended := launch(*words)).code == 0, ended
    return ended.out


def shown(**words: str) -> list[list[str]]:
    """The commands of the page, with these words in place of those there."""
    page = (Path(__file__).parents[2] / "docs/tune.md").read_text()
    lines = re.findall(r"^python -m launch (.*)$", page, re.MULTILINE)
    return [[words.get(word, word) for word in shlex.split(line)] for line in lines]


def talked(monkeypatch: pytest.MonkeyPatch, *command: str) -> str:
    """The answers to two lines, and to the first one again."""
    monkeypatch.setattr("sys.stdin", io.StringIO("red green\nblue\n/new\nred green\n"))
    answers = ran(*command, "--max-tokens", "6", "--temperature", "0")
    first, second, again, *rest = answers.split("\n")
    assert first == again != second and rest == [""]
    return answers


@pytest.mark.slow(20)
@pytest.mark.parametrize(("data", "more"), [("talks", ()), ("labeled", ()), ("talks", ("--full",))])
def test_a_file_becomes_a_tuned_model(data: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the commands of the page."""
    new, prepare, train, chat, merge, adapter = shown(**{"chats.jsonl": f"{data}.jsonl", "hf:Qwen/Qwen3-0.6B": BASE})
    printed = ran(*new, *more)
    run, recipe = load("configs/mychat.py").run, load("configs/data/mychat.py").run
    assert (run.adapter is None) == bool(more) and run.init == BASE
    assert type(recipe.format) is (Labeled if data == "labeled" else Chat)
    assert recipe.format.template.endswith("model/tokenizer_config.json")
    assert ("all parameters" if more else "a LoRA adapter") in printed
    ran(*prepare, "--workers", "1")
    ran("data", "show", "configs/mychat.py")
    peeked = ran("data", "peek", "configs/mychat.py", "--mask", "--chars", "5000")
    colored = {text.removesuffix("<|im_end|>") for text in re.findall(r"\x1b\[32m(.*?)\x1b\[0m", peeked)}
    assert colored and colored <= answers(data)
    ran(*train, *SMALL)
    if data == "labeled":  # what becomes of an adapter does not depend on the data
        ran("evaluate", "runs/mychat")
        return
    here = talked(monkeypatch, *chat)
    if more:
        refused(launch(*merge), "--merge runs/mychat no adapter")
        merge.remove("--merge")
    else:
        refused(launch(*merge[:-1]), "runs/mychat adapter --adapter --merge")
        ran(*adapter)
        config = json.loads(Path("out/adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(Path("model").resolve()) and config["r"] == 16
        assert talked(monkeypatch, "chat", "hf:out/adapter") == here
        checked = ran("hub", "check", "out/adapter", "--hashes")
        assert "LoRA of rank 16, alpha 32" in checked and "1 file with the bytes that were exported" in checked
        ran("hub", "export", "hf:out/adapter", "out/again", "--merge")
        ran(*train, *SMALL[1:], "name=more", "init=hf:out/adapter")
    ran(*merge)
    assert talked(monkeypatch, "chat", f"hf:{merge[3]}") == here
    for name in () if more else ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        files = [Path("out", folder, name).read_bytes() for folder in ("mychat", "adapter", "again")]
        assert files[0] == files[1] == files[2], "an adapter has with it what the merged model has"
    ran("evaluate", "runs/mychat")


@pytest.mark.slow(20)
@pytest.mark.parametrize("more", [(), ("--full",)])
def test_a_model_without_a_chat_template_gets_its_tokens(
    more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_chat_model(Path("bare"), None, has_tokens=False)
    new, prepare, train, chat, merge, adapter = shown(**{"chats.jsonl": "talks.jsonl", "hf:Qwen/Qwen3-0.6B": "hf:bare"})
    assert "template chatml, whose tokens <|im_start|> and <|im_end|> are added" in ran(*new, *more)
    ran(*prepare, "--workers", "1")
    run = load("configs/mychat.py", ["train.global_batch=8", "mesh.fsdp=4", "mesh.tensor=2"]).run
    first = Program(run, make_mesh(run.mesh, jax.devices()))
    embedding = np.asarray(load_params("hf:bare", first, current_peers()).params["embedding"])
    before = read_tensors(base)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding[:257], before)
    np.testing.assert_allclose(embedding[257:], np.broadcast_to(before.mean(0), (127, 32)), atol=1e-6)
    ran(*train, *SMALL)
    here = talked(monkeypatch, *chat)
    if more:
        merge.remove("--merge")
    else:
        refused(launch(*adapter), "--adapter runs/mychat embedding --merge")
    ran(*merge)
    out = Path(merge[3])
    config, generation = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert config["vocab_size"] == 384 and generation["eos_token_id"] == [0, 258]
    assert (out / "chat_template.jinja").read_text() == PRESETS["chatml"]
    assert talked(monkeypatch, "chat", f"hf:{out}") == here


@pytest.mark.parametrize("preset", PRESETS)
def test_the_prompt_of_an_answer_is_what_was_trained_on_before_it(preset: str) -> None:
    talk = [("user", "Hi <|im_end|>"), ("assistant", "Hello."), ("user", "How?"), ("assistant", "So.")]
    messages = [{"role": role, "content": content} for role, content in talk]
    template = ChatTemplate(preset)
    prompt, whole = template.to_prompt(messages[:3]), template.to_spans(messages, (1, 3))
    text = ["".join(span.text for span in spans) for spans in (prompt, whole)]
    assert text[1].startswith(text[0]) and text[1][len(text[0]) :].startswith("So.")
    assert [span.text for span in prompt if not span.from_template] == ["Hi <|im_end|>", "Hello.", "How?"]


def test_a_template_that_does_not_say_what_an_answer_is_gives_way_to_a_preset(tmp_path: Path) -> None:
    tiny_chat_model(tmp_path / "loud", "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert "template chatml" in ran("new", "talks.jsonl", "--from", "hf:loud", "--name", "loud")
    assert load("configs/data/loud.py").run.format.template == "chatml"


def test_a_prompt_and_its_completion_are_trained_on_as_a_conversation(tmp_path: Path) -> None:
    """A record that is none is left out, and the first of them is shown."""
    records = [{"prompt": f"Say {index}", "completion": f"{index} it is. " * 10} for index in range(300)]
    lines = [json.dumps(each) for each in records]
    Path("answers.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    assert "on its answers" in ran("new", "answers.jsonl", "--from", "hf:model", "--name", "answered")
    recipe = load("configs/data/answered.py").run
    assert isinstance(recipe.format, Completion) and recipe.format.template.endswith("tokenizer_config.json")
    printed = ran("data", "prepare", "configs/answered.py", "--workers", "1")
    assert "answers.jsonl:301: not JSON" in printed and "skipped.jsonl" in printed


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "words")
    refused(launch("new", "talks.jsonl", "--from", "hf:nowhere"), "hf:nowhere no such folder")
    Path("odd.jsonl").write_text(json.dumps({"messages": [{"role": "robot", "content": "a"}]}) + "\n")
    refused(launch("new", "odd.jsonl", "--from", "hf:model"), "odd.jsonl first record message 1 robot")
    for field, there in (("rejectd", "chosen"), ("choosen", "rejected")):
        Path("odd.jsonl").write_text(json.dumps({"prompt": "a", there: "b", field: "c"}) + "\n")
        refused(launch("new", "odd.jsonl", "--from", "hf:model"), f"odd.jsonl {there} {field}")
    refused(launch("new", "talks.jsonl", "--full"), "--full --from")
    refused(launch("new", "pairs.jsonl"), "pairs.jsonl --from")
    refused(launch("new", "labeled.jsonl"), "labeled.jsonl labels --from")
    assert not Path("configs").exists()
