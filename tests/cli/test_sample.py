"""Text from a checkpoint: the cache changes nothing, pieces are the whole, a seed fixes a draw."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.sample import Sampler, SamplingParams, filter_top_k_top_p, sampling_program
from tests.refusals import refused, suggested
from tests.tiny_run import Tiny, contents, launch

GREEDY = SamplingParams(temperature=0.0)
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
    return Sampler.from_run(trained)


def encoded(sampler: Sampler, text: str) -> list[int]:
    return sampler._tokenizer.encode(text)


def greedy_without_cache(sampler: Sampler, ids: list[int], count: int) -> list[int]:
    """The likeliest next word, each time from a forward pass over all words so far."""
    program = sampling_program(sampler._program.run)
    length = len(ids) + count

    @jax.jit
    def logits(tokens: jax.Array) -> jax.Array:
        return program.model(sampler._params)({"inputs": tokens}).materialize()

    with program.on_mesh:
        for at in range(len(ids), length):
            padded = np.zeros((1, length), np.int32)
            padded[0, :at] = ids
            ids = [*ids, int(jnp.argmax(logits(padded)[0, at - 1]))]
    return ids[-count:]


def test_greedy_is_the_argmax_of_the_whole_forward_pass(sampler: Sampler) -> None:
    """Decoding one word at a time from a cache finds the same words as reading everything anew."""
    eot_id = sampler._tokenizer.eot_id
    prompt = encoded(sampler, PROMPT)
    found = list(sampler.tokens(prompt, max_tokens=24, sampling=GREEDY))
    expected = greedy_without_cache(sampler, prompt, 24)
    expected = expected[: expected.index(eot_id)] if eot_id in expected else expected
    assert found == expected and len(found) > 2


def test_prompt_longer_than_a_block(sampler: Sampler) -> None:
    """The padding of the prompt is never seen."""
    prompt = encoded(sampler, "w1 w7 w50 w45 w11 " * 8)[:75]
    found = list(sampler.tokens(prompt, max_tokens=4, sampling=GREEDY))
    assert found == greedy_without_cache(sampler, prompt, 4)[: len(found)]


def test_padding_of_a_prompt_does_not_change_a_recurrent_state(tiny: Tiny) -> None:
    mixer = ("num_key_heads=8", "num_value_heads=8", "key_head_dim=4", "value_head_dim=4")
    overrides = ("model.layers.mixer=gated_delta_net", *(f"model.layers.mixer.{each}" for each in mixer))
    program = sampling_program(tiny.loaded(*overrides, "mesh.fsdp=1"))
    with program.on_mesh:
        sampler = Sampler(program, program.init(jax.random.key(0)).params)
    prompt = encoded(sampler, "w1 w7 w50 w45 w11 " * 8)[:75]
    found = list(sampler.tokens(prompt, max_tokens=8, sampling=GREEDY))
    assert found == greedy_without_cache(sampler, prompt, 8)[: len(found)] and len(found) > 2


def test_averaged_parameters_are_sampled(trained: Path, sampler: Sampler) -> None:
    program = sampling_program(sampler._program.run)
    with program.on_mesh, CheckpointManager(trained / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(12, program.state)
    for found, average, last in zip(*map(jax.tree.leaves, (sampler._params, state.ema, state.params)), strict=True):
        assert np.array_equal(found, average) and not np.array_equal(found, last)


def test_pieces_join_to_the_text(sampler: Sampler) -> None:
    for sampling in (GREEDY, SamplingParams(temperature=1.5, top_k=0, top_p=1.0)):
        pieces = list(sampler.stream(PROMPT, max_tokens=40, sampling=sampling))
        ids = list(sampler.tokens(encoded(sampler, PROMPT), max_tokens=40, sampling=sampling))
        assert "".join(pieces) == sampler._tokenizer.decode(ids)
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
    ids = encoded(sampler, PROMPT)
    greedy = list(sampler.tokens(ids, max_tokens=10, sampling=GREEDY))
    assert list(sampler.tokens(ids, max_tokens=10, sampling=SamplingParams(top_k=1))) == greedy
    assert list(sampler.tokens(ids, max_tokens=10, sampling=SamplingParams(top_k=0, top_p=1e-6))) == greedy


def test_filter_top_k_top_p() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))

    def kept(top_k: int, top_p: float) -> list[bool]:
        return jnp.isfinite(filter_top_k_top_p(logits, top_k=top_k, top_p=top_p))[0].tolist()

    assert kept(0, 1.0) == kept(4, 1.0) == kept(9, 1.0) == [True] * 4
    assert kept(2, 1.0) == [False, True, False, True]
    assert kept(0, 0.3) == [False, True, False, False]
    assert kept(0, 0.65) == [False, True, False, True]
    assert kept(0, 0.75) == [False, True, True, True]
    # Of the two likeliest the first has 4/7: it alone is enough for a half.
    assert kept(2, 0.5) == [False, True, False, False]


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
