"""Text from a checkpoint: the cache changes nothing, pieces are the whole, a seed fixes a draw."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.data.tokenizer import StopStrings
from jaxinfra.inference.language_model import language_model, open_language_model
from jaxinfra.inference.sampler import Sampler, SamplingParams
from jaxinfra.inference.sampling import filter_logits, sample_tokens
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import load_params
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.processes.peers import Peers
from jaxinfra.track.jsonl import read_samples
from tests.models.harness import ONE, build
from tests.refusals import refused, suggested
from tests.tiny_run import Tiny, contents, launch

GREEDY = SamplingParams(temperature=0.0)
LIVELY = SamplingParams(temperature=1.5, top_k=0, top_p=1.0)
PROMPT = "w1 w7 w50"


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run that keeps averaged parameters."""
    folder = tmp_path_factory.mktemp("trained")
    config = str(tiny_data / "tiny.py")
    assert launch(config, f"root={folder}", "name=sampled", "optim.ema_decay=0.5", "track.console=off").code == 0
    return folder / "sampled"


@pytest.fixture(scope="module")
def sampler(trained: Path) -> Sampler:
    """On the mesh of the run: fsdp over all devices."""
    return Sampler.from_run(trained)


@pytest.fixture(scope="module")
def single(trained: Path) -> Sampler:
    return on_devices(trained, 1)


def on_devices(trained: Path, count: int) -> Sampler:
    """A sampler on the first devices, on which nothing is sharded if there is one."""
    model = open_language_model(trained)
    program = sampling_program(model.run, jax.devices()[:count])
    return Sampler(model, program, load_params(trained, program, Peers()).params)


def greedy(sampler: Sampler, ids: list[int], count: int, sampling: SamplingParams = GREEDY) -> list[int]:
    """The tokens after one prompt, up to the end of its document."""
    found = [token for (token,) in sampler.tokens([ids], max_tokens=count, sampling=sampling)]
    eot_id = sampler.model.tokenizer.eot_id
    return found[: found.index(eot_id)] if eot_id in found else found


def greedy_without_cache(sampler: Sampler, ids: list[int], count: int) -> list[int]:
    """The likeliest next word, each time from a forward pass over all words so far, on one device."""
    length = len(ids) + count

    @jax.jit
    def logits(tokens: jax.Array) -> jax.Array:
        return sampler.program.model(sampler._params)({"inputs": tokens}).materialize()

    with sampler.program.on_mesh:
        for at in range(len(ids), length):
            padded = np.zeros((1, length), np.int32)
            padded[0, :at] = ids
            ids = [*ids, int(jnp.argmax(logits(padded)[0, at - 1]))]
    found, eot_id = ids[-count:], sampler.model.tokenizer.eot_id
    return found[: found.index(eot_id)] if eot_id in found else found


def test_greedy_is_the_argmax_of_the_whole_forward_pass(sampler: Sampler, single: Sampler) -> None:
    """Decoding one word at a time from a cache on a mesh finds the same words as reading everything anew."""
    prompt = sampler.model.encode(PROMPT)
    found = greedy(sampler, prompt, 24)
    assert found == greedy_without_cache(single, prompt, 24) and len(found) > 2


def talkative(trained: Path, mesh: str) -> Sampler:
    """A sampler with such large random parameters that each word depends on all before it."""
    model = open_language_model(trained, mesh.split())
    program = sampling_program(model.run, jax.devices()[: 1 if not mesh else 8], strict=True)
    with program.on_mesh:
        params = jax.tree.map(lambda p: p * 4, program.init(jax.random.key(0)).params)
    return Sampler(model, program, params)


@pytest.mark.parametrize("mesh", ["mesh.fsdp=8", "mesh.tensor=4 mesh.fsdp=2", "mesh.replica=2 mesh.tensor=2"])
def test_a_batch_on_a_mesh_gives_the_texts_of_one_prompt_and_one_device(trained: Path, mesh: str) -> None:
    """The padding of shorter prompts, and of rows for all devices, is never seen."""
    prompts, single = [PROMPT, "w1", "w3 w22 " * 20, "w1 w7 w50 w45 w11 " * 8, "w60"], talkative(trained, "")
    expected = [single.complete([prompt], max_tokens=12, sampling=GREEDY)[0] for prompt in prompts]
    assert talkative(trained, mesh).complete(prompts, max_tokens=12, sampling=GREEDY) == expected
    assert len({found.text for found in expected}) == len(prompts), expected


def test_a_row_takes_the_next_prompt(trained: Path) -> None:
    """The rows that prompts share change no text, be it greedy or at random, where each has its own limit."""
    sampler, prompts = talkative(trained, "mesh.tensor=4 mesh.fsdp=2"), [f"w{i} w7" for i in range(7)]
    limits = [2, 9, 1, 5, 3, 7, 4]
    for sampling in (GREEDY, LIVELY):
        together, shared = (
            sampler.complete(prompts, max_tokens=limits, sampling=sampling, rows=rows) for rows in (None, 2)
        )
        assert shared == together and [found.tokens for found in shared if found.finish == "length"]


def test_a_text_ends_before_a_stop_string(trained: Path) -> None:
    """Each row of a batch ends on its own."""
    sampler, prompts = talkative(trained, "mesh.fsdp=8"), ["w1", "w3 w22", PROMPT]
    whole = [found.text for found in sampler.complete(prompts, max_tokens=40, sampling=GREEDY)]
    stop = whole[2][20:28]  # over several tokens
    stopping = SamplingParams(temperature=0, stop=("never said", stop))
    stopped = sampler.complete(prompts, max_tokens=40, sampling=stopping)
    assert sampler.complete(PROMPT, max_tokens=40, sampling=stopping) == stopped[2:], "a prompt by itself"
    for text, found in zip(whole, stopped, strict=True):
        assert found.text == text.partition(stop)[0] and (found.finish == "stop") == (stop in text)
        assert found.tokens < 40 or found.finish == "length"
    assert stopped[2].finish == "stop" and stopped[2].text
    assert "".join(sampler.stream(PROMPT, max_tokens=40, sampling=stopping)) == stopped[2].text


def test_a_text_ends_with_its_document(sampler: Sampler) -> None:
    prompts, tokenizer = ["w1"] * 16, sampler.model.tokenizer
    found = sampler.complete(prompts, max_tokens=60, sampling=LIVELY)
    ids = [sampler.model.encode(prompt) for prompt in prompts]
    steps = [*sampler.tokens(ids, max_tokens=60, sampling=LIVELY)]
    for completion, row in zip(found, map(list, zip(*steps, strict=True)), strict=True):
        end = row.index(tokenizer.eot_id) if tokenizer.eot_id in row else None
        assert completion.text == tokenizer.decode(row[:end])
        assert completion[1:] == ((60, "length") if end is None else (end + 1, "end"))
    assert {completion.finish for completion in found} == {"length", "end"}
    assert len({completion.text for completion in found}) == 16  # rows have random numbers of their own


def test_stop_strings_in_pieces() -> None:
    for size in (1, 2, 5, 40):
        stop, text = StopStrings(["abc", "cd"]), "ab abx abab cabcd"
        pieces = [stop.push(text[start : start + size]) for start in range(0, 16, size)]
        assert "".join(pieces) == "ab abx abab c" and stop.found


def test_padding_of_a_prompt_does_not_change_a_recurrent_state(tiny: Tiny) -> None:
    mixer = ("num_key_heads=8", "num_value_heads=8", "key_head_dim=4", "value_head_dim=4")
    overrides = ("model.layers.mixer=gated_delta_net", *(f"model.layers.mixer.{each}" for each in mixer))
    model = language_model(tiny.loaded(*overrides))
    program = sampling_program(model.run, jax.devices()[:1])
    with program.on_mesh:
        sampler = Sampler(model, program, program.init(jax.random.key(0)).params)
    prompt = sampler.model.encode("w1 w7 w50 w45 w11 " * 8)[:75]
    found = greedy(sampler, prompt, 8)
    assert found == greedy_without_cache(sampler, prompt, 8)[: len(found)] and len(found) > 2


def test_averaged_parameters_are_sampled(trained: Path, sampler: Sampler) -> None:
    program = sampler.program
    with program.on_mesh, CheckpointManager(trained / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(12, program.state)
    for found, average, last in zip(*map(jax.tree.leaves, (sampler._params, state.ema, state.params)), strict=True):
        assert np.array_equal(found, average) and not np.array_equal(found, last)


def test_pieces_join_to_the_text(sampler: Sampler) -> None:
    for sampling in (GREEDY, LIVELY):
        pieces = list(sampler.stream(PROMPT, max_tokens=40, sampling=sampling))
        ids = greedy(sampler, sampler.model.encode(PROMPT), 40, sampling)
        assert "".join(pieces) == sampler.model.tokenizer.decode(ids)
        assert 0 < len(ids) <= 40


def test_a_seed_fixes_the_text(sampler: Sampler) -> None:
    def text(seed: int) -> str:
        return "".join(
            sampler.stream(
                PROMPT, max_tokens=30, sampling=SamplingParams(temperature=1.5, top_k=0, top_p=1.0, seed=seed)
            )
        )

    assert text(1) == text(1)
    assert len({text(1), text(2), text(3)}) > 1


def test_no_random_choice_is_greedy(sampler: Sampler) -> None:
    ids = sampler.model.encode(PROMPT)
    expected = greedy(sampler, ids, 10)
    assert greedy(sampler, ids, 10, SamplingParams(top_k=1)) == expected
    assert greedy(sampler, ids, 10, SamplingParams(top_k=0, top_p=1e-6)) == expected


def test_filter_logits() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))

    def kept(top_k: int, top_p: float, min_p: float = 0.0) -> list[bool]:
        return jnp.isfinite(filter_logits(logits, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)))[0].tolist()

    assert kept(0, 1.0) == kept(4, 1.0) == kept(9, 1.0) == [True] * 4
    assert kept(2, 1.0) == [False, True, False, True]
    assert kept(0, 0.3) == [False, True, False, False]
    assert kept(0, 0.65) == [False, True, False, True]
    assert kept(0, 0.75) == [False, True, True, True]
    # Of the two likeliest the first has 4/7: it alone is enough for a half.
    assert kept(2, 0.5) == [False, True, False, False]
    assert kept(0, 1.0, 0.6) == [False, True, False, True] and kept(0, 1.0, 1.0) == [False, True, False, False]


VOCABULARY = np.array([0.02, 0.25, 0.1, 0.35, 0.01, 0.15, 0.08, 0.04])
DRAWS = 1 << 14


def theory(temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The probabilities of the next token: each limit applies to what the one before has left."""

    def keep(probs: np.ndarray, kept: np.ndarray) -> np.ndarray:
        return np.where(kept, probs, 0) / probs[kept].sum()

    probs = VOCABULARY ** (1 / temperature)
    probs /= probs.sum()
    probs = keep(probs, probs >= np.sort(probs)[-top_k or -len(probs)])
    likelier = np.array([probs[probs > each].sum() for each in probs])
    probs = keep(probs, likelier < top_p)
    return keep(probs, probs >= min_p * probs.max())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.7, 0, 1.0, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.0, 0, 1.0, 0.2),
        (1.5, 6, 0.8, 0.5),
    ],
)
def test_tokens_have_the_distribution_of_the_theory(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """By a chi-square test, which notices a temperature that is half as high again."""
    built, size = build(ONE), len(VOCABULARY)
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with jax.set_mesh(built.mesh):
        hidden = jnp.broadcast_to(jnp.log(VOCABULARY.astype("f4")), (DRAWS, 1, size))
        logits = FactoredLogits(hidden=built.put_rows(hidden), head=jnp.eye(size))
        rows = jnp.arange(DRAWS)
        draw = jax.jit(lambda logits, key: sample_tokens(logits, key, rows, rows * 0, sampling, built.partitioner))
        drawn = draw(logits, jax.random.key(0))
    counts = np.bincount(np.asarray(drawn)[:, 0], minlength=size)

    def p_value(probs: np.ndarray) -> float:
        kept = probs > 0
        return 0.0 if counts[~kept].any() else float(chisquare(counts[kept], DRAWS * probs[kept]).pvalue)

    assert p_value(theory(temperature, top_k, top_p, min_p)) > 1e-3
    assert p_value(theory(1.5 * temperature, top_k, top_p, min_p)) < 1e-6


@pytest.mark.jax_range
def test_command(trained: Path) -> None:
    """Prints the prompt and goes on; the run is only read."""
    before = contents(trained)
    words = ("sample", str(trained), PROMPT, "--max-tokens", "8", "--temperature", "0")
    shown = launch(*words)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(PROMPT) and shown.out.endswith("\n") and len(shown.out) > len(PROMPT) + 1
    assert launch(*words).out == shown.out
    assert contents(trained) == before


def test_many_prompts(trained: Path, tmp_path: Path) -> None:
    """A JSON line for each line of a file, the same as for the prompts in words, in batches of any size."""
    prompts = ["w1", "w3 w22", PROMPT]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    words = ("sample", str(trained), "--max-tokens", "8", "--temperature", "0")
    lines = launch(*words, "--prompts", str(tmp_path / "prompts.txt"), "--batch", "2")
    assert (lines.code, lines.err) == (0, "")
    rows = [json.loads(line) for line in lines.out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts and all(row["tokens"] <= 8 for row in rows)
    shown = launch(*words, *prompts, "mesh.tensor=2")
    assert shown.out == "".join(row["prompt"] + row["text"] + "\n" for row in rows)


def test_refusals(trained: Path, tmp_path: Path) -> None:
    words = ("sample", str(trained))
    refused(launch(*words), "--prompts")
    refused(launch(*words, "w1", "--prompts", "x"), "--prompts")
    refused(launch(*words, "--prompts", str(tmp_path / "none")), f"--prompts {tmp_path / 'none'}")
    refused(launch(*words, "w1", "--stop", ""), "--stop")
    refused(launch(*words, "w1", "--min-p", "1.5"), "--min-p 1.5")
    refused(launch(*words, "w1", "mesh.tensor=3"), "mesh.tensor=3 8")


def test_a_mesh_that_does_not_fit_is_replaced(tiny: Tiny) -> None:
    def mesh(devices: int, *overrides: str) -> dict[str, int]:
        program = sampling_program(tiny.loaded(*overrides), jax.devices()[:devices])
        return {axis: size for axis, size in program.mesh.shape.items() if size > 1}

    assert mesh(8, "mesh.fsdp=4", "mesh.tensor=2", "train.canonical=8") == {"fsdp": 4, "tensor": 2}
    assert mesh(4, "mesh.fsdp=4", "mesh.tensor=2") == {"fsdp": 2, "tensor": 2}
    assert mesh(3, "mesh.fsdp=4", "mesh.tensor=2") == {"replica": 3}  # 3 does not divide the hidden size
    assert mesh(8, "model.hidden_size=36", "model.layers.mixer.head_dim=4") == {"fsdp": 4, "replica": 2}
    assert mesh(8, "mesh.stage=2", "mesh.context=2", "mesh.tensor=2", "mesh.fsdp=1") == {"fsdp": 4, "tensor": 2}


@pytest.mark.slow(10)
def test_a_run_with_stages_is_sampled_without_them(tiny: Tiny) -> None:
    """In training and after it, where its stages become fsdp."""
    overrides = ("mesh.stage=2", "mesh.fsdp=4", "train.steps=3", "train.eval_samples=8", "track.console=off")
    assert tiny.launch(*overrides, "name=stages", f"track.sample_prompt={PROMPT}").code == 0
    step, text = read_samples(tiny.directory("stages") / "samples.jsonl")[-1]
    shown = launch("sample", str(tiny.directory("stages")), PROMPT, "--max-tokens", "100")
    assert step == 3 and shown.out == f"{text}\n", shown


def test_the_prompt_of_a_run_must_leave_room(tiny: Tiny) -> None:
    overrides = ("model.learned_positions=128", "model.layers.mixer.rope=none", "train.steps=3", "track.console=off")
    long = " ".join(["w1"] * 60)
    line = refused(tiny.launch(*overrides, f"track.sample_prompt={long}"), "track.sample_prompt: positions prompt")
    assert "--max-tokens" not in line
    assert tiny.launch(*overrides, *suggested(line), "name=none").code == 0
    assert tiny.launch(*overrides, "track.sample_prompt=w1", "name=short").code == 0


def test_learned_positions_end(tiny: Tiny) -> None:
    """What the model has no position for is refused, with what fits."""
    overrides = (
        "model.learned_positions=96",
        "model.layers.mixer.rope=none",
        "name=learned",
        "train.steps=3",
        "track.console=off",
    )
    assert tiny.launch(*overrides).code == 0
    directory = str(tiny.directory("learned"))
    long = launch("sample", directory, "w1", "--max-tokens", "96")
    fix = re.search(r"use --max-tokens (\d+)", refused(long, "96"))
    assert fix is not None and long.out == "", long
    fitting, also = (launch("sample", directory, "w1", name, fix[1]) for name in ("--max-tokens", "--max-new-tokens"))
    assert fitting.code == 0 and fitting == also
