"""Scores of local tasks equal those from the logits of the model, which NumPy takes one text at a time."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.inference.language_model import open_language_model
from jaxinfra.inference.sampler import Sampler, SamplingParams
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import load_params
from jaxinfra.processes.peers import Peers
from jaxinfra.tasks.harness import Tasks
from jaxinfra.track.jsonl import read_metrics
from tests.interop.torch_python import TORCH_PYTHON, needs_torch
from tests.refusals import refused
from tests.tasks.task_files import CHOICES, GENERATION, ROLLING, write_task
from tests.tiny_run import Tiny, ended, launch
from tests.tiny_run import start as start_process
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

PROMPTS = ["w1 w8 w57", "w3", "w12 w24 w47 w30 w28 w14 w38", "w5 w36 w10 w11", "w60 w55 w20 w20", "w2 w15"]
OPTIONS = [[f"w{(7 * i + j) % 61}" for j in (1, 2, 30)] for i in range(len(PROMPTS))]
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


@needs_torch
@pytest.mark.slow(40)
def test_scores_equal_those_of_lm_evals_own_model(trained: Path, tmp_path: Path) -> None:
    """lm-eval scores the export with transformers, and this package scores it on a mesh of two processes."""
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
    command = [TORCH_PYTHON, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={out},dtype=float32"]
    command += ["--device", "cpu", "--tasks", ",".join(tasks), "--output_path", tmp_path / "theirs"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-3000:]
    (result,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(result.read_text())["results"]
    words = ("mesh.fsdp=2", "mesh.tensor=4", "--tasks", ",".join(tasks), "--json", str(tmp_path / "ours.json"))
    both = ("--processes", "2", "--devices", "cpu:8")
    scored = ended(start_process("evaluate", f"hf:{out}", *words, *both), timeout_s=600)
    assert scored.code == 0, scored
    ours = json.loads((tmp_path / "ours.json").read_text())["tasks"]
    assert ours.keys() == theirs.keys() == {"choices", "generation", "rolling"}
    for task, metrics in ours.items():
        found = {name: value for name, value in metrics.items() if name != "samples" and not name.endswith("_stderr")}
        assert found and found == pytest.approx({name: theirs[task][f"{name},none"] for name in found}, abs=1e-3), task


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
    refused(launch("evaluate", str(tmp_path), "--tasks", greedy), str(tmp_path))


def test_a_missing_package_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(launch("evaluate", str(trained), "--tasks", "hellaswag"), "--tasks lm_eval pip")


@pytest.mark.slow(8)
def test_an_unknown_name(trained: Path) -> None:
    refused(launch("evaluate", str(trained), "--tasks", "hellaswagg"), "--tasks hellaswagg hellaswag?")
