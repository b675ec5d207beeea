"""LongRoPE has the frequencies of transformers: by the length of each document, and of a text that grows."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfra.data.tokenizer.raw_bytes import ByteTokenizer
from jaxinfra.data.tokens import TokenData
from jaxinfra.inference.language_model import LanguageModel
from jaxinfra.inference.sampler import Sampler, SamplingParams
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import load_params
from jaxinfra.processes.peers import Peers
from jaxinfra.run import Precision, Run
from tests.interop.conftest import References
from tests.interop.references import DOCUMENTS, PROMPTS
from tests.interop.test_families import logits_of, read_tiny
from tests.interop.torch_python import needs_torch
from tests.models.harness import relative_error
from tests.tiny_run import launch

NAME = "phi3-long"


@needs_torch
@pytest.mark.slow(3)
def test_packed_documents_are_those_of_each_alone_in_transformers(references: References) -> None:
    """Packs documents of 17 tokens, more than the original length, and of 7, without padding."""
    expected = references.arrays(NAME)
    rows = len(expected["tokens"])
    positions = np.tile(np.concatenate([np.arange(length) for length in DOCUMENTS]), (rows, 1))
    segments = np.tile(np.repeat([1, 2], DOCUMENTS), (rows, 1))
    batch = {"inputs": expected["tokens"], "positions": positions, "segments": segments}
    logits, _, _ = logits_of(references.folder / NAME, **batch)
    assert relative_error(logits, expected["documents"]) < 1e-5


def sampler_of(folder: Path) -> Sampler:
    """Opens a model without a tokenizer on eight devices."""
    _, built = read_tiny(folder)
    data = TokenData(store="none", seq_len=1)
    run = Run(name="published", model=built.config, data=data, precision=Precision(compute="float32"))
    model = LanguageModel(run=run, tokenizer=ByteTokenizer("<|end|>"), first_tokens=(), max_length=64, end_ids=())
    program = sampling_program(run, jax.devices())
    return Sampler(model, program, load_params(f"hf:{folder}", program, Peers()).params)


@needs_torch
@pytest.mark.slow(8)
def test_a_text_that_grows_beyond_the_original_length_is_that_of_transformers(references: References) -> None:
    """Two of three prompts of a batch do so, after six tokens and after one; the third one has been longer before."""
    expected, sampler = references.arrays(NAME), sampler_of(references.folder / NAME)
    tokens = expected["tokens"][0].tolist()
    prompts, length = [tokens[:prompt] for prompt in PROMPTS], expected["tokens"].shape[1]
    count = length - min(PROMPTS)
    steps = sampler.tokens(prompts, max_tokens=count, sampling=SamplingParams(temperature=0))
    for prompt, *new in zip(prompts, *steps, strict=True):
        assert [*prompt, *new][:length] == expected[f"after {len(prompt)}"][0].tolist()

    # A row of 17 and one of 7 tokens are scored together, both with padding after them.
    logits = np.split(expected["documents"][0], [DOCUMENTS[0]])
    rows = [[*part, 5] for part in np.split(expected["tokens"][0], [DOCUMENTS[0]])]
    for row, scored, wanted in zip(rows, sampler.scores(rows), logits, strict=True):
        log_probs = np.asarray(jax.nn.log_softmax(wanted))[np.arange(len(row) - 1), row[1:]]
        assert relative_error(scored.log_probs, log_probs) < 1e-4


@needs_torch
@pytest.mark.slow(1)
def test_check_says_which_documents_have_which_factor(references: References) -> None:
    found = launch("hub", "check", f"hf:{references.folder / NAME}")
    assert found.code == 0 and "short_factor for documents up to 16 tokens" in " ".join(found.out.split())
    other = launch("hub", "check", f"hf:{references.folder / 'phi3-grouped'}")
    assert other.code == 0 and "short_factor" not in other.out
