"""`python -m launch sample RUN_DIR PROMPT`: continues a text with the newest checkpoint of a run."""

import argparse
from collections.abc import Sequence

from jaxinfra.sample import Sampler, SamplingParams


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints the prompt and its continuation, while it is decoded."""
    sampling = SamplingParams(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    sampler = Sampler.from_run(options.run_dir, options.imports)
    shown = options.prompt
    for text in sampler.stream(options.prompt, max_tokens=options.max_tokens, sampling=sampling):
        print(shown + text, end="", flush=True)
        shown = ""
    print(shown)
    return 0
