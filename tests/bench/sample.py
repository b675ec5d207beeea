"""`python -m launch bench sample`: tokens a second of greedy sampling, beside `generate` of transformers.

Both continue the same number of random prompts with the same random model in float32, each in a process of its own with
two threads; the first call of each, which compiles, is not timed. `refill` decodes prompts with answers of unlike
lengths in eight rows: where a text has ended the next prompt begins, or all rows wait for the longest of eight prompts.
"""

import argparse
import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from jaxinfra.errors import ConfigError
from jaxinfra.hub.published_model import open_published, param_shapes
from jaxinfra.inference.language_model import require_text
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.sampling import SamplingParams
from jaxinfra.parity.workers import call_in_all, worker_pool
from tests.bench.commands import command_error, started
from tests.bench.table import Cases, Columns, TableRow, median_ratio, time_rounds
from tests.interop.conftest import write_tensors
from tests.interop.tiny_llama import write_tokenizer
from tests.interop.torch_python import TORCH_PYTHON

THREADS, PROMPT, NEW, ROWS, PROMPTS = 2, 64, 128, 8, 64
MODEL = {
    "model_type": "qwen3",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
"""100 million parameters."""
ENV = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "NPROC": str(THREADS)}

COLUMNS: Columns = {
    "case": ("prompts", ""),
    "jaxinfra": ("jaxinfra", "{:.1f} tokens/s"),
    "other": ("the other", "{:.1f} tokens/s"),
    "side": ("", ""),
    "ratio": ("ratio", "{:.2f}"),
}
NOTE = ", in turns; a ratio above 1 says that jaxinfra is faster"


def write_model(folder: Path) -> None:
    """Writes a random model of MODEL, with a tokenizer that is not used."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    model, rng = open_published(str(folder)), np.random.default_rng(0)
    bindings = model.family.bindings(model.config, param_shapes(model.config))
    shapes = {name: each.shape for each in bindings for name in each.names}
    write_tensors(
        folder, {n: np.ones(s, "f4") if len(s) == 1 else 0.02 * rng.normal(size=s) for n, s in shapes.items()}
    )
    write_tokenizer(folder, "<end>")


@functools.cache
def sampler_of(folder: str) -> Sampler:
    """Loads the model, whose texts do not end by themselves."""
    sampler = Sampler.from_run(f"hf:{folder}")
    sampler.model = replace(sampler.model, end_ids=())
    return sampler


def decode(folder: str, prompts: int, length: int, limits: Sequence[int], rows: int, at_once: int) -> float:
    """Continues random prompts, `at_once` of them in a call; returns the seconds."""
    sampler, sampling = sampler_of(folder), SamplingParams(temperature=0)
    vocab = require_text(sampler.model.run)[0].vocab_size
    ids = np.random.default_rng(0).integers(1, vocab, (prompts, length)).tolist()
    start_s = time.perf_counter()
    for first in range(0, prompts, at_once):
        part = slice(first, first + at_once)
        found = sampler.completions(ids[part], max_tokens=limits[part], sampling=sampling, rows=rows)
        assert [each.tokens for each in found] == [*limits[part]]
    return time.perf_counter() - start_s


def ask(process: subprocess.Popen[str], words: str, log: Path) -> float:
    """Returns the answer of `torch_generate.py` to a line."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{words}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise command_error([str(TORCH_PYTHON), "tests/interop/torch_generate.py"], log.read_text())
    return float(answer)


def rows_of(options: argparse.Namespace, count: int) -> Iterator[TableRow]:
    """Compares the sides for a batch of this many prompts."""
    if not TORCH_PYTHON.exists():
        raise ConfigError(
            "bench sample: needs torch and transformers; `make test-slow` installs them, or use --only refill"
        )
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder, worker_pool(1, ENV) as pool:
        write_model(Path(folder))
        log = Path(folder) / "log"
        script = Path(__file__).parents[1] / "interop/torch_generate.py"
        with started([str(TORCH_PYTHON), str(script), folder, str(THREADS)], os.environ, log) as torch:

            def own(_: int) -> float:
                return call_in_all([pool], decode, folder, count, PROMPT, [NEW] * count, count, count)[0]

            sides = {"jaxinfra": own, "other": lambda _: ask(torch, f"{count} {PROMPT} {NEW}", log)}
            times_s = time_rounds(sides, options.pairs)
    yield row(str(count), "generate of transformers", times_s, count * NEW)


def refill(options: argparse.Namespace) -> Iterator[TableRow]:
    """Compares rows that take the next prompt with batches that wait for their longest text."""
    limits = [int(n) for n in np.random.default_rng(0).geometric(4 / NEW, PROMPTS).clip(1, NEW)]
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-") as folder, worker_pool(1, ENV) as pool:
        write_model(Path(folder))

        def side(at_once: int, _: int) -> float:
            return call_in_all([pool], decode, folder, PROMPTS, PROMPT, limits, ROWS, at_once)[0]

        times_s = time_rounds({"jaxinfra": partial(side, PROMPTS), "other": partial(side, ROWS)}, options.pairs)
    yield row(f"{PROMPTS} in {ROWS} rows", f"jaxinfra in batches of {ROWS}", times_s, sum(limits))


def row(case: str, other: str, times_s: Mapping[str, Sequence[float]], tokens: int) -> TableRow:
    """Returns the median tokens a second of both sides, and the median of their ratios."""
    speeds = {side: tokens / median(each_s) for side, each_s in times_s.items()}
    return {"case": case, **speeds, "side": other, "ratio": median_ratio(times_s["other"], times_s["jaxinfra"])}


CASES: Cases = {**{f"batch-{n}": partial(rows_of, count=n) for n in (1, 8, 32)}, "refill": refill}
