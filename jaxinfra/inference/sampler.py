"""Samples texts from a language model with KV caches, and scores texts with it, in batches on all devices.

Prompts of a batch may have unlike lengths: each row is padded at its end, and its cache has a length of its own. All
processes make the same calls and get the same texts.

Shape suffixes: B rows, T length, D width of the residual stream, V vocabulary, 1 a dimension of size one.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.config.classes import ClassFinder
from jaxinfra.data.tokenizer import StopStrings, StreamDecoder
from jaxinfra.errors import ConfigError
from jaxinfra.inference.decoding import Decoder, pad_rows, padded_length
from jaxinfra.inference.language_model import LanguageModel, language_model, open_language_model, require_text
from jaxinfra.inference.multi_adapter import load_adapters
from jaxinfra.inference.sampling import SamplingParams
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import TrainedParams, load_params
from jaxinfra.objectives.losses import token_scores
from jaxinfra.parallel.spec import Params
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.program import Program
from jaxinfra.run import Run

_CONTINUATION_TOKENS = 100  # that follow `track.sample_prompt`
_SCORED_TOKENS = 4096  # that a device scores at once, of several rows
_SAMPLING = SamplingParams()


class Completion(NamedTuple):
    """The continuation of a prompt.

    Attributes:
        text: the text, without a stop string.
        tokens: number of tokens that were sampled for it, with the one that ended it.
        finish: what ended it: the end of the document, a stop string, or the maximum number of tokens.
    """

    text: str
    tokens: int
    finish: Literal["end", "stop", "length"]


class TokenScores(NamedTuple):
    """Scores of the tokens of a row after the first, each given the tokens before it.

    Attributes:
        log_probs: log-probabilities, float32 `[T - 1]`.
        likeliest: whether it is the likeliest token, bool `[T - 1]`.
    """

    log_probs: np.ndarray
    likeliest: np.ndarray


class Sampler:
    """A language model with its parameters on a mesh, and its tokenizer.

    Attributes:
        model: its config and its tokenizer.
        program: its program on the mesh.
        rows: a batch has a multiple of this number of rows.
    """

    def __init__(self, model: LanguageModel, program: Program, params: Params, columns: np.ndarray | None = None):
        """Binds the parameters, which must be on the mesh of the program, made by `sampling_program`.

        `columns` are those of several adapters (see `AdaptedModel`).
        """
        self.model, self.program, self._params = model, program, params
        self.rows = program.partitioner.num_shards("batch")
        self._decoder, self._prepared = Decoder(program, columns), None

    @classmethod
    def from_run(
        cls, source: str | Path, imports: Sequence[str] | ClassFinder = (), overrides: Sequence[str] = ()
    ) -> Self:
        """Loads a language model onto all devices: the newest checkpoint of a run, or that of a step with `RUN@STEP`.

        Takes the averaged parameters if the run keeps them. `overrides` are of its mesh; without them, another mesh is
        used where that of the run does not fit the devices.
        """
        model = open_language_model(source, overrides, imports)
        return cls.load(source, model, overrides)[0]

    @classmethod
    def with_adapters(
        cls,
        sources: Sequence[str],
        imports: Sequence[str] | ClassFinder = (),
        overrides: Sequence[str] = (),
    ) -> Self:
        """Loads several adapters of one base, which `completions` can use in one batch (see `load_adapters`)."""
        return cls(*load_adapters(sources, overrides, imports))

    @classmethod
    def load(
        cls, source: str | Path, model: LanguageModel, overrides: Sequence[str] = ()
    ) -> tuple[Self, TrainedParams]:
        """Loads the parameters of a source whose model was opened with these overrides."""
        strict = any(override.startswith("mesh.") for override in overrides)
        program = sampling_program(model.run, all_devices(), strict=strict)
        loaded = load_params(source, program, current_peers())
        return cls(model, program, loaded.params), loaded

    @classmethod
    def from_params(cls, run: Run, params: Params) -> Self:
        """Takes parameters on the mesh of a run; those of pipeline stages are resharded, as sampling has none."""
        sharding = jax.tree.leaves(params)[0].sharding
        assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
        sampler = cls(language_model(run), sampling_program(run, sharding.mesh), params)
        sampler.set_params(params)
        return sampler

    def set_params(self, params: Params) -> None:
        """Takes other parameters of the same model, on a mesh of the same devices.

        They are not copied if they have the right shardings, but on CPUs to decode; the sampler is of no use once they
        are donated.
        """
        self._params = jax.device_put(params, jax.tree.map(lambda p: p.sharding, self.program.params))
        self._prepared = None

    def drop_params(self) -> None:
        """Lets go of the parameters, until `set_params` gives others."""
        self._params, self._prepared = {}, None

    # Texts

    def stream(self, prompt: str, *, max_tokens: int, sampling: SamplingParams = _SAMPLING) -> Iterator[str]:
        """Yields the continuation in pieces of whole characters, as soon as they are decoded.

        Ends after `max_tokens`, at the end of the document, or before a stop string.
        """
        yield from self.stream_tokens(self.model.encode(prompt), max_tokens=max_tokens, sampling=sampling)

    def stream_tokens(
        self, prompt: Sequence[int], *, max_tokens: int, sampling: SamplingParams = _SAMPLING
    ) -> Iterator[str]:
        """Does the same as `stream`, for a prompt of at least one token."""
        text = _Text(self.model, sampling)
        for _ in self._decode([prompt], [max_tokens], sampling, 1, lambda _, token: text.ends_with(token)):
            if text.pieces[-1]:
                yield text.pieces[-1]
        if rest := text.flush():
            yield rest

    def complete(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int | Sequence[int],
        sampling: SamplingParams = _SAMPLING,
        rows: int | None = None,
    ) -> list[Completion]:
        """Returns the continuations of prompts, or of one; each ends like that of `stream` (see `completions`)."""
        ids = [self.model.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        return [*self.completions(ids, max_tokens=max_tokens, sampling=sampling, rows=rows)]

    def completions(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int],
        sampling: SamplingParams = _SAMPLING,
        rows: int | None = None,
        adapters: Sequence[int] = (0,),
    ) -> Iterator[Completion]:
        """Yields the continuations of prompts of at least one token each, in their order, as soon as they are there.

        With several adapters, those of the first prompt with each of them are first.

        Args:
            prompts: the tokens of the prompts.
            max_tokens: the maximum number of tokens of a continuation, or of each one.
            sampling: how tokens are sampled; their random numbers depend on the index of the prompt.
            rows: the number of texts to decode at once; where one has ended, the next one begins. None is all.
            adapters: indices of the adapters that each prompt is continued with.
        """
        limits, count = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else [*max_tokens], len(adapters)
        texts, first = [_Text(self.model, sampling) for _ in range(len(prompts) * count)], 0
        for _ in self._decode(
            prompts,
            limits,
            sampling,
            rows or len(texts),
            lambda index, token: texts[index].ends_with(token),
            adapters,
        ):
            while first < len(texts) and (texts[first].finish or texts[first].tokens == limits[first // count]):
                yield texts[first].completion()
                first += 1

    def continue_prompt(self, prompt: str) -> str:
        """Returns a prompt of `track.sample_prompt` with 100 tokens after it; ConfigError if they do not fit."""
        room = (self.model.max_positions or math.inf) - len(self.model.encode(prompt))
        if room < _CONTINUATION_TOKENS:
            raise ConfigError(
                f"{_CONTINUATION_TOKENS} tokens must fit after the prompt, but learned positions leave {max(0, room)}; "
                "use track.sample_prompt=none, or a shorter prompt"
            )
        return prompt + "".join(self.stream(prompt, max_tokens=_CONTINUATION_TOKENS))

    # Tokens

    def tokens(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: SamplingParams = _SAMPLING
    ) -> Iterator[list[int]]:
        """Yields the next token of each prompt, `max_tokens` times.

        A row goes on after the end of its document: what follows then has no meaning. Raises ConfigError if a prompt
        and its continuation are longer than the model's learned positions.
        """
        found = [deque[int]() for _ in prompts]
        for index, token in self._decode(
            prompts, [max_tokens] * len(prompts), sampling, len(prompts), lambda *_: False
        ):
            found[index].append(token)
            if all(found):
                yield [tokens.popleft() for tokens in found]

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: SamplingParams,
        rows: int,
        ends: Callable[[int, int], bool],
        adapters: Sequence[int] = (0,),
    ) -> Iterator[tuple[int, int]]:
        """Decodes as `Decoder.decode`; raises ConfigError if a text is longer than the model's learned positions."""
        for prompt, limit in zip(prompts, limits, strict=True):
            self._require_room(len(prompt), limit)
        if self._prepared is None:
            self._prepared = self._decoder.prepare(self._params)
        yield from self._decoder.decode(
            self._prepared, prompts, limits, sampling, rows=rows, ends=ends, adapters=adapters
        )

    def scores(self, rows: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Scores the tokens of rows, in the order of the rows; rows of similar length are computed together."""
        by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        found: dict[int, TokenScores] = {}
        while by_length:
            length = self._slots(len(rows[by_length[0]]) - 1)
            batch = by_length[: self.rows * max(1, _SCORED_TOKENS // length)]
            by_length = by_length[len(batch) :]
            size = -(-len(batch) // self.rows) * self.rows
            inputs_BT, counts_B = pad_rows([rows[index][:-1] for index in batch], length, size)
            targets_BT, _ = pad_rows([rows[index][1:] for index in batch], length, size)
            with self.program.on_mesh:
                scores = map(np.asarray, self._score(self._params, inputs_BT, targets_BT, counts_B))
            for index, log_probs, likeliest in zip(batch, *scores, strict=False):
                count = len(rows[index]) - 1
                found[index] = TokenScores(log_probs[:count], likeliest[:count])
        return [found[index] for index in range(len(rows))]

    def _slots(self, length: int) -> int:
        """Returns the length that rows are padded to; the model has positions for it."""
        return min(padded_length(length), self.model.max_positions or padded_length(length))

    def _require_room(self, length: int, max_tokens: int) -> None:
        """Raises ConfigError if the model has learned positions, but too few."""
        max_positions = self.model.max_positions
        if max_positions is not None and length + max_tokens > max_positions:
            room = max_positions - length
            raise ConfigError(
                f"--max-tokens {max_tokens}: with a prompt of {length} tokens it exceeds the {max_positions} "
                f"learned positions of the model; use {f'--max-tokens {room}' if room > 0 else 'a shorter prompt'}"
            )

    @partial(jax.jit, static_argnums=0)
    def _score(
        self, params: Params, inputs_BT: jax.Array, targets_BT: jax.Array, counts_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        spec = self.program.partitioner.spec("batch", None)
        batch, targets_BT = {"inputs": jax.reshard(inputs_BT, spec)}, jax.reshard(targets_BT, spec)
        if require_text(self.model.run)[0].short_lengths:  # then padding must not count as a part of the document
            batch["segments"] = jax.reshard((jnp.arange(inputs_BT.shape[1]) < counts_B[:, None]).astype(int), spec)
        scores = token_scores(self.program.model(params)(batch), targets_BT)
        return jax.tree.map(lambda a: jax.reshard(a, P()), scores)


class _Text:
    """The continuation of one prompt, token by token.

    Attributes:
        tokens: number of tokens.
        pieces: the text that each token has completed.
        finish: what has ended it, or None.
    """

    def __init__(self, model: LanguageModel, sampling: SamplingParams):
        special = model.tokenizer.special_tokens  # which are in no text, where a stop string could be found
        self._ends: dict[int, Literal["end", "stop"]] = dict.fromkeys(model.end_ids, "end")
        self._ends |= {special[text]: "stop" for text in sampling.stop if text in special}
        self._decoder, self._stop = StreamDecoder(model.tokenizer), StopStrings(sampling.stop)
        self.tokens, self.pieces = 0, list[str]()
        self.finish: Literal["end", "stop"] | None = None

    def ends_with(self, token: int) -> bool:
        """Adds a token; returns whether it ends the text."""
        self.tokens += 1
        if token in self._ends:
            self.finish = self._ends[token]
            self.pieces.append(self.flush())
            return True
        self.pieces.append(self._stop.push(self._decoder.push(token)))
        if self._stop.found:
            self.finish = "stop"
        return self._stop.found

    def flush(self) -> str:
        """Returns the rest of the text after the last token; "" if it is called again."""
        return "" if self._stop.found else self._stop.push(self._decoder.flush()) + self._stop.flush()

    def completion(self) -> Completion:
        """Returns the text, once."""
        return Completion("".join([*self.pieces, self.flush()]), self.tokens, self.finish or "length")
