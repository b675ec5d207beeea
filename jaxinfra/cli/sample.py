"""`python -m launch sample RUN_DIR PROMPT`: text from the newest checkpoint, streamed as it is decoded."""

import argparse
from collections.abc import Sequence

from jaxinfra.cli.config_argument import add_number


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run directory, the prompt, and how to draw."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from")
    add_number(parser, "--max-tokens", 1, default=200, help="stop after so many (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many; 0 is all (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="and from this share of probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints the prompt and its continuation."""
    from jaxinfra.sample import Draw, Sampler

    draw = Draw(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    sampler = Sampler.from_run(options.run_dir)
    shown = options.prompt
    for text in sampler.stream(options.prompt, max_tokens=options.max_tokens, draw=draw):
        print(shown + text, end="", flush=True)
        shown = ""
    print(shown)
    return 0
