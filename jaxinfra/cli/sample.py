"""`python -m launch sample RUN_DIR PROMPT`: continues a text with a checkpoint of a run."""

import argparse
from collections.abc import Sequence

from jaxinfra.runtime.peers import current_peers
from jaxinfra.sample import Sampler, SamplingParams


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints the prompt and its continuation, while it is decoded.

    Several processes all decode, so that none waits for another; process 0 prints.
    """
    sampling = SamplingParams(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    sampler = Sampler.from_run(options.run_dir, options.imports)
    prompt = options.prompt  # printed with the first text, so that an error before it is the only output
    prints = current_peers().index == 0
    for text in sampler.stream(prompt, max_tokens=options.max_tokens, sampling=sampling):
        if prints:
            print(prompt + text, end="", flush=True)
            prompt = ""
    if prints:
        print(prompt)
    return 0
