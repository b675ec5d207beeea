"""Scores of local tasks equal those from the logits of the model, which NumPy takes one text at a time."""

import json
import math
import string
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.cli.evaluate import render
from jaxinfra.errors import ConfigError
from jaxinfra.inference.language_model import open_language_model
from jaxinfra.inference.sampler import Sampler, SamplingParams
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import load_params
from jaxinfra.prepare.documents.chat_template import ChatTemplate
from jaxinfra.processes.peers import Peers
from jaxinfra.tasks.harness import Tasks
from jaxinfra.track.jsonl import read_metrics
from tests.interop.conftest import read_tensors, write_tensors
from tests.interop.tiny_llama import EMBEDDING, tiny_chat_model
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.refusals import refused
from tests.tasks.task_files import ANSWERS, CHOICES, GENERATION, ROLLING, write_task
from tests.tiny_run import Tiny, ended, launch
from tests.tiny_run import start as start_process
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

PROMPTS = ["w1 w8 w57", "w3", "w12 w24 w47 w30 w28 w14 w38", "w5 w36 w10 w11", "w60 w55 w20 w20", "w2 w15"]
OPTIONS = [[f"w{(7 * i + j) % 61}" for j in (1, 2, 30)] for i in range(len(PROMPTS))]
TRIMS = """{{ bos_token }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MESHES = [["mesh.fsdp=8"], ["mesh.tensor=4", "mesh.fsdp=2"]]


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert launch(str(tiny_data / "tiny.py"), f"root={folder}", "track.console=off", "train.eval_every=none").code == 0
    return folder / "tiny"


class Reference:
    """The model on one device, and its log-probabilities in float64."""

    def __init__(self, trained: Path):
        self.model = open_language_model(trained)
        program = sampling_program(self.model.run, jax.devices()[:1])
        params = load_params(trained, program, Peers()).params
        self.sampler = Sampler(self.model, program, params)
        self._logits = jax.jit(lambda ids: program.model(params)({"inputs": ids}).materialize())

    def log_probs(self, ids: list[int]) -> np.ndarray:
        """`[T - 1, V]` for the tokens after the first."""
        with self.sampler.program.on_mesh:
            logits = np.asarray(self._logits(np.array([ids + [0] * (64 - len(ids))])), np.float64)[0, : len(ids) - 1]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def score(self, context: str, continuation: str) -> float:
        before, whole = (self.model.tokenizer.encode(text) for text in (context, context + continuation))
        log_probs = self.log_probs(whole)[len(before) - 1 :]
        return sum(float(row[token]) for row, token in zip(log_probs, whole[len(before) :], strict=True))


@pytest.fixture(scope="module")
def reference(trained: Path) -> Reference:
    return Reference(trained)


@pytest.mark.parametrize("mesh", MESHES, ids=["fsdp", "tensor"])
def test_multiple_choice(trained: Path, reference: Reference, tmp_path: Path, mesh: list[str]) -> None:
    scores = np.array(
        [[reference.score(p, f" {word}") for word in words] for p, words in zip(PROMPTS, OPTIONS, strict=True)]
    )
    answers = [(int(row.argmax()) + (i == 0)) % 3 for i, row in enumerate(scores)]  # the first one is wrong
    rows = [{"prompt": p, "options": o, "answer": a} for p, o, a in zip(PROMPTS, OPTIONS, answers, strict=True)]
    task = write_task(tmp_path, "choices", CHOICES, rows)
    lengths = np.array([[len(word) for word in words] for words in OPTIONS])
    shown = launch("evaluate", str(trained), *mesh, "--tasks", task, "--json", str(tmp_path / "result.json"))
    assert (shown.code, shown.err) == (0, ""), shown
    result = json.loads((tmp_path / "result.json").read_text())
    found = result["tasks"]["choices"]
    assert found["samples"] == len(PROMPTS) and found["acc"] == pytest.approx(1 - 1 / len(PROMPTS))
    assert found["acc_norm"] == pytest.approx(np.mean((scores / lengths).argmax(1) == answers))
    assert "acc_norm" in shown.out and "0.8333" in shown.out and result["step"] == 12
    assert {axis: size for axis, size in result["mesh"].items() if size > 1} == {
        word.split("=")[0].removeprefix("mesh."): int(word.split("=")[1]) for word in mesh
    }


def test_likelihoods(trained: Path, reference: Reference) -> None:
    """Scores of requests of unlike lengths, also without a context, equal those of the logits; greedy flags agree."""
    from jaxinfra.tasks.model import MeshLM

    model = MeshLM(Sampler.from_run(trained, (), ["mesh.fsdp=2", "mesh.tensor=4"]))
    pairs = [(p, f" {word}") for p, words in zip(PROMPTS, OPTIONS, strict=True) for word in words]
    found = model.loglikelihood([request(*pair) for pair in pairs])
    assert [score for score, _ in found] == pytest.approx([reference.score(*pair) for pair in pairs], abs=1e-4)
    assert not any(likeliest for _, likeliest in found)
    greedy, *_ = reference.sampler.complete(["w1"], max_tokens=3, sampling=SamplingParams(temperature=0))
    ((_, is_greedy), (whole, _)) = model.loglikelihood([request("w1", greedy.text), request("", "w1 w8")])
    assert is_greedy and whole == pytest.approx(unconditional(reference, "w1 w8", 32), abs=1e-4)


def request(*args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=args, idx=0)


def unconditional(reference: Reference, text: str, window: int) -> float:
    """The log-probability of a document, in windows of the length of training that overlap by one token."""
    ids, eot, total = reference.model.tokenizer.encode(text), reference.model.tokenizer.eot_id, 0.0
    for start in range(0, len(ids), window):
        targets = ids[start : start + window]
        first = max(0, start + len(targets) - window)  # the last window has as much before it as fits
        context = ids[first - 1 : start] if first else [eot, *ids[:start]]
        log_probs = reference.log_probs([*context, *targets])[len(context) - 1 :]
        total += sum(float(row[token]) for row, token in zip(log_probs, targets, strict=True))
    return total


def test_a_text_longer_than_the_model(trained: Path, reference: Reference, tmp_path: Path) -> None:
    texts = ["w1 w8 w57 " * 12, "w5"]
    assert len(reference.model.tokenizer.encode(texts[0])) > 2 * reference.model.max_length
    task = write_task(tmp_path, "rolling", ROLLING, [{"text": text} for text in texts])
    found = Tasks([task]).run(reference.sampler)["rolling"]
    total = sum(unconditional(reference, text, 32) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / sum(map(len, texts)), rel=1e-5)


def test_generation(trained: Path, reference: Reference, tmp_path: Path) -> None:
    """A batch of unlike prompts says what each says alone, up to a stop string."""
    sampling = SamplingParams(temperature=0, stop=(" w w",))
    said = [reference.sampler.complete([p], max_tokens=8, sampling=sampling)[0].text for p in PROMPTS]
    rows = [
        {"prompt": p, "said": text if i else "another"} for i, (p, text) in enumerate(zip(PROMPTS, said, strict=True))
    ]
    task = write_task(tmp_path, "generation", GENERATION, rows, until=" w w")
    sampler = Sampler.from_run(trained, (), ["mesh.fsdp=4", "mesh.tensor=2"])
    found = Tasks([task]).run(sampler)["generation"]
    assert found["exact_match"] == pytest.approx(1 - 1 / len(PROMPTS))
    assert Tasks([task]).run(sampler, limit=1)["generation"]["exact_match"] == 0


@pytest.mark.slow(12)
def test_tasks_in_training(tiny: Tiny, tmp_path: Path) -> None:
    """Each evaluation logs them, of the averaged parameters, as a later evaluation finds them."""
    rows = [{"prompt": p, "options": o, "answer": i % 3} for i, (p, o) in enumerate(zip(PROMPTS, OPTIONS, strict=True))]
    choices = write_task(tmp_path, "choices", CHOICES.replace("acc_norm", "brier_score"), rows)
    rolling = write_task(tmp_path, "rolling", ROLLING, [{"text": "w1 w8 w57"}])
    overrides = [f"train.eval_tasks=({choices},{rolling})", "optim.ema_decay=0.5", "train.eval_samples=8", "name=tiny"]
    overrides += ["mesh.fsdp=4", "mesh.tensor=2", "train.eval_every=6", "checkpoint.keep_best=1", "track.console=off"]
    overrides += ["checkpoint.best_metric=rolling/bits_per_byte"]
    assert tiny.launch(*overrides).code == 0
    logged = [row for row in read_metrics(tiny.directory() / "metrics.jsonl") if "eval/loss" in row]
    assert [int(row["step"]) for row in logged] == [6, 12]
    shown = launch(
        *("evaluate", str(tiny.directory()), "--tasks", f"{choices},{rolling}", "--json", str(tmp_path / "found.json"))
    )
    assert shown.code == 0, shown
    for task, metrics in json.loads((tmp_path / "found.json").read_text())["tasks"].items():
        names = {name for name in metrics if name != "samples" and not name.endswith("_stderr")}
        assert names == {name.split("/")[2] for name in logged[1] if name.startswith(f"eval/{task}/")}
        assert all(logged[1][f"eval/{task}/{name}"] == pytest.approx(metrics[name], rel=1e-5) for name in names)
    assert logged[0]["eval/rolling/bits_per_byte"] > logged[1]["eval/rolling/bits_per_byte"]
    refused(tiny.launch("train.eval_tasks=none.yaml", "name=none"), "train.eval_tasks none.yaml")
    assert not tiny.directory("none").exists()  # before anything is compiled or written


def chat_model(out: Path) -> str:
    """Writes a model of bytes that begins texts with a token and ends answers with one, most of them soon."""
    tiny_chat_model(out, TRIMS)
    read = lambda name: json.loads((out / name).read_text())  # noqa: E731
    tokenizer, vocab = read("tokenizer.json"), read("tokenizer.json")["model"]["vocab"]
    begins = {"id": "<end>", "ids": [0], "tokens": ["<end>"]}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<end>": begins},
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": "<end>"}
    for name, content in {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": read("tokenizer_config.json") | names,
        "config.json": read("config.json") | {"max_position_embeddings": 192},
    }.items():
        (out / name).write_text(json.dumps(content))
    tensors = read_tensors(out)
    likely = [0, 1, 2, *(vocab[letter] for letter in string.ascii_lowercase + string.digits + "ĠĊ")]
    scale = np.full((len(tensors[EMBEDDING]), 1), 0.3, np.float32)
    scale[likely] = 1
    write_tensors(out, {**tensors, EMBEDDING: tensors[EMBEDDING] * scale})
    return str(out)


def answer_tasks(folder: Path) -> list[str]:
    """Tasks with earlier turns, with and without the beginning of an answer; some prompts exceed the model."""
    rows = [{"prompt": f"what is {n}{' or else' * (n % 3) * 8}", "said": "d"} for n in range(12)]
    examples = folder / "examples.jsonl"
    examples.write_text("".join(json.dumps({"prompt": f"say {w}", "said": w}) + "\n" for w in ("red", "blue", "pink")))
    values = [("answers", "null"), ("begun", '"I say: "')]
    return [write_task(folder, name, ANSWERS, rows, examples=str(examples), begins=begins) for name, begins in values]


@needs_torch
@pytest.mark.slow(45)
def test_scores_equal_those_of_lm_evals_own_model(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval scores the export with transformers, and this package scores it on a mesh of two processes.

    Prompts and texts of a chat model are equal, too, with its chat template and without.
    """
    pairs = enumerate(zip(PROMPTS, OPTIONS, strict=True))
    options = [{"prompt": prompt, "options": words, "answer": i % 3} for i, (prompt, words) in pairs]
    said = [{"prompt": prompt, "said": " w1 w8"} for prompt in PROMPTS]
    texts = [{"text": "w1 w8 w57 " * 12}, {"text": "w5 w9"}]
    tasks = [
        write_task(tmp_path, "choices", CHOICES, options),
        write_task(tmp_path, "generation", GENERATION, said, until=" w w"),
        write_task(tmp_path, "rolling", ROLLING, texts),
    ]
    out = tmp_path / "out"
    assert launch("hub", "export", str(trained), str(out)).code == 0
    chat, chat_tasks = chat_model(tmp_path / "chat"), answer_tasks(tmp_path)
    chat_tasks.append(write_task(tmp_path, "choices", CHOICES.replace("acc_norm", "brier_score"), options))
    of_chat = {"model": chat, "tasks": chat_tasks}
    as_chat = {"apply_chat_template": True, "system_instruction": "Be kind."}
    (tmp_path / "jobs.json").write_text(json.dumps([{"model": str(out), "tasks": tasks}, of_chat, of_chat | as_chat]))
    command = [TORCH_PYTHON, Path(__file__).with_name("torch_tasks.py"), tmp_path / "jobs.json", tmp_path / "theirs"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-3000:]
    theirs, *their_chats = json.loads((tmp_path / "theirs").read_text())
    words = ("mesh.fsdp=2", "mesh.tensor=4", "--tasks", ",".join(tasks), "--json", str(tmp_path / "ours.json"))
    both = ("--processes", "2", "--devices", "cpu:8")
    scored = ended(start_process("evaluate", f"hf:{out}", *words, *both), timeout_s=600)
    assert scored.code == 0, scored
    ours = json.loads((tmp_path / "ours.json").read_text())["tasks"]
    assert ours.keys() == {"choices", "generation", "rolling"}
    assert_same_scores(ours, theirs["results"])

    texts = said_texts(monkeypatch)
    for their, chat_words in zip(their_chats, [(), ("--chat", "--system", "Be kind.")], strict=True):
        words = ("mesh.fsdp=4", "mesh.tensor=2", "--tasks", ",".join(chat_tasks), "--json", str(tmp_path / "ours.json"))
        shown = launch("evaluate", f"hf:{chat}", *words, *chat_words)
        assert shown.code == 0, shown
        ours = json.loads((tmp_path / "ours.json").read_text())["tasks"]
        assert ours.keys() == {"answers", "begun", "choices"}
        assert_same_scores(ours, their["results"])
        assert all(0 < ours[task]["exact_match/letter"] < 1 for task in ("answers", "begun"))
        assert texts.pop() == their["texts"]["answers"] + their["texts"]["begun"]
        assert len({said for _, said in their["texts"]["answers"]}) > 6


def said_texts(monkeypatch: pytest.MonkeyPatch) -> list[list[list[str]]]:
    """Returns a list of the prompts of tasks with their texts, one for each evaluation, in few rows."""
    from jaxinfra.tasks import model

    texts, generate = [], model.MeshLM.generate_until

    def record(self: Any, requests: Any, **options: Any) -> list[str]:
        found = generate(self, requests, **options)
        texts.append([[request.arguments[0], text] for request, text in zip(requests, found, strict=True)])
        return found

    monkeypatch.setattr(model.MeshLM, "generate_until", record)
    monkeypatch.setattr(model, "_ROWS", 1)  # so that rows take further prompts
    return texts


def assert_same_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for task, metrics in ours.items():
        found = {name: value for name, value in metrics.items() if name != "samples" and "_stderr" not in name}
        labels = {name: name.replace("/", ",") if "/" in name else f"{name},none" for name in found}
        assert found and found == pytest.approx({name: theirs[task][labels[name]] for name in found}, abs=1e-3), task


def test_refusals(trained: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "said": "w2"}]
    greedy = write_task(tmp_path, "greedy", GENERATION.replace("max_gen_toks: 8", "max_gen_toks: 32"), rows, until="x")
    damaged = write_task(tmp_path, "damaged", CHOICES, rows)
    (tmp_path / "damaged.jsonl").unlink()
    words = ("evaluate", str(trained))
    refused(launch(*words, "--tasks", str(tmp_path / "none.yaml")), f"--tasks {tmp_path / 'none.yaml'}")
    refused(launch(*words, "--tasks", greedy), "--tasks generation 32 max_gen_toks")
    refused(launch(*words, "--tasks", damaged), f"--tasks {damaged} damaged.jsonl", code=78)
    refused(launch(*words, "--limit", "3"), "--tasks --limit")
    refused(launch(*words, "--chat"), "--tasks --chat")
    ends = write_task(tmp_path, "ends", GENERATION, rows, until="x")
    refused(launch(*words, "--tasks", ends, "--system", "Be kind."), "--system --chat")
    refused(launch(*words, "--tasks", ends, "--chat"), f"{trained} conversations --template chatml")
    (tmp_path / "asks.jinja").write_text("{{ raise_exception('no answers') }}")
    asked = launch(*words, "--tasks", ends, "--chat", "--template", str(tmp_path / "asks.jinja"))
    refused(asked, "asks.jinja no answers --template")
    bare = tiny_chat_model(tmp_path / "bare", None)
    refused(
        launch("evaluate", f"hf:{bare}", "--tasks", ends, "--chat"), f"hf:{bare} no chat template --template chatml"
    )
    refused(launch("evaluate", str(tmp_path), "--tasks", greedy), str(tmp_path))


def test_a_template_without_a_place_for_a_message(
    reference: Reference, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """System messages are left out, as lm-eval does, with one warning; others are refused."""
    from jaxinfra.tasks.model import MeshLM

    (tmp_path / "picky.jinja").write_text(
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no ' + m.role) }}{% endif %}"
        "<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    model = MeshLM(reference.sampler, partial(render, ChatTemplate(str(tmp_path / "picky.jinja"))))
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "w1"}]
    assert [model.apply_chat_template(talk) for _ in range(2)] == ["<w1>:"] * 2
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("jaxinfra"))
    assert warning.startswith("--chat: ") and "no system" in warning and "left out" in warning
    assert model.apply_chat_template(talk[1:], add_generation_prompt=False) == "<w1"
    with pytest.raises(ConfigError, match=r"--chat: .*no assistant.*--template"):
        model.apply_chat_template([*talk, {"role": "assistant", "content": "w2"}], add_generation_prompt=False)


def test_how_a_task_samples() -> None:
    """A temperature says that it does not take the likeliest tokens, unless do_sample says otherwise."""
    from jaxinfra.tasks.model import sampling_of

    options = [{}, {"temperature": 0.5}, {"temperature": 0.5, "do_sample": False}, {"do_sample": True}]
    assert [sampling_of(each)[0].temperature for each in options] == [0, 0.5, 0, 1]


def test_a_missing_package_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(launch("evaluate", str(trained), "--tasks", "hellaswag"), "--tasks lm_eval pip")


@pytest.mark.slow(8)
def test_an_unknown_name(trained: Path) -> None:
    refused(launch("evaluate", str(trained), "--tasks", "hellaswagg"), "--tasks hellaswagg hellaswag?")
