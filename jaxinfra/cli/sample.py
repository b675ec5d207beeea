"""`python -m launch sample RUN_DIR PROMPT...`: continues texts with a checkpoint of a run, on all devices."""

import argparse
import json
import re
from collections.abc import Sequence
from itertools import product

from jaxinfra.errors import ConfigError
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.sampling import SamplingParams
from jaxinfra.machine.compile_cache import compile_cache

_MESH_OVERRIDE = re.compile(r"mesh\.[a-z]+=\S*")


def run(options: argparse.Namespace) -> None:
    """Prints prompts with their continuations: one prompt while it is decoded, several in their order.

    All processes take part; process 0 prints.
    """
    sampling = SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        stop=tuple(options.stop),
    )
    overrides = [word for word in options.words if _MESH_OVERRIDE.fullmatch(word)]
    prompts = [word for word in options.words if word not in overrides]
    if bool(prompts) == (options.prompts is not None):
        raise ConfigError(f"sample {options.run_dir}: expects prompts or --prompts FILE; name one of both")
    if options.prompts is not None:
        prompts = _read_lines(options.prompts)
    sources = [options.run_dir, *options.adapters]
    if options.adapters:
        sampler = Sampler.with_adapters(sources, options.imports, overrides)
    else:
        sampler = Sampler.from_run(options.run_dir, options.imports, overrides)
    with compile_cache(sampler.model.run.train.compile_cache):
        if len(prompts) == 1 and options.prompts is None and not options.adapters:
            _stream(sampler, prompts[0], options, sampling)
        else:
            _print_all(sampler, prompts, sources, options, sampling)


def _stream(sampler: Sampler, prompt: str, options: argparse.Namespace, sampling: SamplingParams) -> None:
    for text in sampler.stream(prompt, max_tokens=options.max_tokens, sampling=sampling):
        if options.prints:  # the prompt with the first text, so that an error before it is the only output
            print(prompt + text, end="", flush=True)
            prompt = ""
    if options.prints:
        print(prompt)


def _print_all(
    sampler: Sampler,
    prompts: Sequence[str],
    sources: Sequence[str],
    options: argparse.Namespace,
    sampling: SamplingParams,
) -> None:
    ids = [sampler.model.encode(prompt) for prompt in prompts]
    completions = sampler.completions(
        ids, max_tokens=options.max_tokens, sampling=sampling, rows=options.batch, adapters=range(len(sources))
    )
    for (prompt, source), found in zip(product(prompts, sources), completions, strict=True):
        of_source = {"source": source} if options.adapters else {}
        if options.prints and options.prompts is None:
            print(f"{source}: " if of_source else "", prompt, found.text, sep="", flush=True)
        elif options.prints:
            print(json.dumps({**of_source, "prompt": prompt, **found._asdict()}, ensure_ascii=False), flush=True)


def _read_lines(path: str) -> list[str]:
    """Returns the lines of a text file; ConfigError if it cannot be read, or has none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--prompts {path}: {cause}; name a text file with a prompt in each line") from None
    if not text:
        raise ConfigError(f"--prompts {path}: is empty; name a text file with a prompt in each line")
    return text.removesuffix("\n").split("\n")
