"""`python -m launch chat RUN`: talks with a model by its chat template, on all devices of a host."""

import argparse
import sys
from collections.abc import Sequence

from jaxinfra.cli.conversation import conversation_template, with_end_of_turn
from jaxinfra.errors import ConfigError
from jaxinfra.inference.language_model import LanguageModel
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.sampling import SamplingParams
from jaxinfra.machine.compile_cache import compile_cache
from jaxinfra.prepare.documents.chat_template import ChatTemplate, Message
from jaxinfra.prepare.documents.document import RecordError
from jaxinfra.prepare.documents.encoding import encode_documents


def run(options: argparse.Namespace) -> None:
    """Answers each line of the standard input until it ends."""
    sampling = SamplingParams(
        temperature=options.temperature, top_k=0, top_p=options.top_p, seed=options.seed, stop=tuple(options.stop)
    )
    sampler = Sampler.from_run(options.run_dir, options.imports, options.overrides)
    template = conversation_template(options.run_dir, sampler.model, options.template)
    sampler.model = with_end_of_turn(sampler.model, template)
    first: list[Message] = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages, shows = [*first], sys.stdin.isatty()
    if shows:
        print("Say something; /new begins anew, an empty line or Ctrl-D ends.")
    with compile_cache(sampler.model.run.train.compile_cache):
        while text := _read(shows):
            if text == "/new":
                messages = [*first]
                continue
            messages.append({"role": "user", "content": text})
            answer = ""
            prompt = _prompt(template, sampler.model, messages)
            for piece in sampler.stream_tokens(prompt, max_tokens=options.max_tokens, sampling=sampling):
                answer += piece
                print(piece, end="", flush=True)
            print(flush=True)
            messages.append({"role": "assistant", "content": answer.strip()})


def _read(shows: bool) -> str:
    """Returns the next line without white space around it; "" at the end of the input."""
    try:
        return input("> " if shows else "").strip()
    except EOFError:
        return ""


def _prompt(template: ChatTemplate, model: LanguageModel, messages: Sequence[Message]) -> list[int]:
    """Returns the tokens of a conversation up to where the answer begins."""
    try:
        spans = template.to_prompt(messages)
    except RecordError as error:
        raise ConfigError(f"chat: {error}") from None
    (document,) = encode_documents(model.tokenizer, [spans])
    return document.ids_N.tolist()  # the template writes the token that begins a text, if there is one
