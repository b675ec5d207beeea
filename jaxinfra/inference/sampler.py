"""Samples texts from a language model with KV caches, and scores texts with it, in batches on all devices.

Prompts of a batch may have unlike lengths: each row is padded at its end, and its cache has a length of its own. All
processes make the same calls and get the same texts.

Shape suffixes: B rows, T length, D width of the residual stream, V vocabulary, 1 a dimension of size one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from jaxinfra.inference.language_model import LanguageModel, language_model, open_language_model, require_text
from jaxinfra.inference.sampling_program import sampling_program
from jaxinfra.inference.trained_params import TrainedParams, load_params
from jaxinfra.models.decoder import Cache, Transformer
from jaxinfra.objectives.losses import token_scores
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import Params
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.program import Program
from jaxinfra.run import Run

_CONTINUATION_TOKENS = 100  # that follow `track.sample_prompt`
_SCORED_TOKENS = 4096  # that a device scores at once, of several rows


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled, and where a text ends.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: samples from this number of likeliest tokens; 0 is all.
        top_p: samples from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        min_p: samples from tokens with at least this part of the likeliest one's probability (Nguyen et al. 2024).
        seed: seed of the random numbers.
        stop: a text ends before the first of these strings.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"--temperature {self.temperature}: must not be negative; use --temperature 0.8")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k}: must not be negative; use --top-k 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1; use --top-p 1 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"--min-p {self.min_p}: must be from 0 to 1; use --min-p 0 for all tokens")
        if "" in self.stop:
            raise ConfigError('--stop "": would end every text at once; leave the option out')


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

    def __init__(self, model: LanguageModel, program: Program, params: Params):
        """Binds the parameters, which must be on the mesh of the program, made by `sampling_program`."""
        self.model, self.program, self._params = model, program, params
        self.rows = program.partitioner.num_shards("batch")

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

        They are not copied if they have the right shardings; the sampler is of no use once they are donated.
        """
        self._params = jax.device_put(params, jax.tree.map(lambda p: p.sharding, self.program.params))

    def drop_params(self) -> None:
        """Lets go of the parameters, until `set_params` gives others."""
        self._params = {}

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
        for (token,) in self.tokens([prompt], max_tokens=max_tokens, sampling=sampling):
            if piece := text.push(token):
                yield piece
            if text.finish is not None:
                return
        if rest := text.flush():
            yield rest

    def complete(
        self, prompts: str | Sequence[str], *, max_tokens: int, sampling: SamplingParams = _SAMPLING
    ) -> list[Completion]:
        """Returns the continuations of a batch of prompts, or of one; each ends like that of `stream`."""
        ids = [self.model.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        return self.complete_tokens(ids, max_tokens=max_tokens, sampling=sampling)

    def complete_tokens(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: SamplingParams = _SAMPLING
    ) -> list[Completion]:
        """Returns the continuations of a batch of prompts of at least one token each."""
        texts, pieces = [_Text(self.model, sampling) for _ in prompts], [[] for _ in prompts]
        for tokens in self.tokens(prompts, max_tokens=max_tokens, sampling=sampling):
            for token, text, found in zip(tokens, texts, pieces, strict=True):
                if text.finish is None:
                    found.append(text.push(token))
            if all(text.finish for text in texts):
                break
        done = zip(texts, pieces, strict=True)
        return [Completion("".join([*p, text.flush()]), text.tokens, text.finish or "length") for text, p in done]

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
        longest = max(map(len, prompts))
        self._require_room(longest, max_tokens)
        slots, rows, cache = self._slots(longest), [[*prompt] for prompt in prompts], None
        tokens, counts = self._padded(rows, slots)
        distribution = replace(sampling, seed=0, stop=())  # one compiled program serves all seeds and stops
        cache_slots = padded_length(max(slots, longest + max_tokens))
        # With LongRoPE a row that becomes this long gets other rotary positions, from its first token on.
        switches = {length + 1 for length in self._short_lengths}
        with self.program.on_mesh:
            key = jax.random.key(sampling.seed)
        for step in range(max_tokens):  # first the padded prompts, then one token at a time
            if step and not switches.isdisjoint(map(len, rows)):
                tokens, counts = self._padded(rows, self._slots(longest + step))
                cache = None
            with self.program.on_mesh:
                cache = cache or self._decoder(self._params).empty_cache(len(tokens), cache_slots)
                step_key = jax.random.fold_in(key, step)
                tokens, cache = self._next_tokens(self._params, cache, tokens, counts, step_key, distribution)
            counts, new = np.ones_like(counts), np.asarray(tokens)[: len(prompts), 0].tolist()
            for row, token in zip(rows, new, strict=True):
                row.append(token)
            yield new

    def scores(self, rows: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Scores the tokens of rows, in the order of the rows; rows of similar length are computed together."""
        by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        found: dict[int, TokenScores] = {}
        while by_length:
            length = self._slots(len(rows[by_length[0]]) - 1)
            batch = by_length[: self.rows * max(1, _SCORED_TOKENS // length)]
            by_length = by_length[len(batch) :]
            inputs_BT, counts_B = self._padded([rows[index][:-1] for index in batch], length)
            targets_BT, _ = self._padded([rows[index][1:] for index in batch], length)
            with self.program.on_mesh:
                scores = map(np.asarray, self._score(self._params, inputs_BT, targets_BT, counts_B))
            for index, log_probs, likeliest in zip(batch, *scores, strict=False):
                count = len(rows[index]) - 1
                found[index] = TokenScores(log_probs[:count], likeliest[:count])
        return [found[index] for index in range(len(rows))]

    def _padded(self, rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens `[B, T]` of as many rows as the mesh needs, and the number of tokens of each row `[B]`."""
        count = -(-len(rows) // self.rows) * self.rows
        tokens_BT, counts_B = np.zeros((count, length), np.int32), np.ones(count, np.int32)
        for row, ids in enumerate(rows):
            tokens_BT[row, : len(ids)], counts_B[row] = ids, len(ids)
        return tokens_BT, counts_B

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

    @property
    def _short_lengths(self) -> tuple[int, ...]:
        """The lengths up to which LongRoPE has the factors of short texts; () without it."""
        return require_text(self.model.run)[0].short_lengths

    def _decoder(self, params: Params) -> Transformer:
        model = self.program.model(params)
        assert isinstance(model, Transformer)
        return model

    @partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
    def _next_tokens(
        self,
        params: Params,
        cache: Cache,
        tokens_BT: jax.Array,
        counts_B: jax.Array,
        key: jax.Array,
        sampling: SamplingParams,
    ) -> tuple[jax.Array, Cache]:
        """Adds the first `counts_B` tokens of each row to the cache; returns the tokens that follow, `[B, 1]`."""
        partitioner = self.program.partitioner
        counts_B = jax.reshard(counts_B, partitioner.spec("batch"))
        logits, cache = self._decoder(params).decode(tokens_BT, cache, counts_B)
        # The last hidden state of each row is cut out before it is multiplied with the head.
        last = jax.vmap(lambda x_TD, count: jax.lax.dynamic_slice_in_dim(x_TD, count - 1, 1))
        logits = replace(logits, hidden=partitioner.map_local(last, logits.hidden, counts_B))
        return _sample_tokens(logits, key, sampling, partitioner), cache

    @partial(jax.jit, static_argnums=0)
    def _score(
        self, params: Params, inputs_BT: jax.Array, targets_BT: jax.Array, counts_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        spec = self.program.partitioner.spec("batch", None)
        batch, targets_BT = {"inputs": jax.reshard(inputs_BT, spec)}, jax.reshard(targets_BT, spec)
        if self._short_lengths:  # then padding must not count as a part of the document
            batch["segments"] = jax.reshard((jnp.arange(inputs_BT.shape[1]) < counts_B[:, None]).astype(int), spec)
        scores = token_scores(self._decoder(params)(batch), targets_BT)
        return jax.tree.map(lambda a: jax.reshard(a, P()), scores)


class _Text:
    """The continuation of one prompt, token by token."""

    def __init__(self, model: LanguageModel, sampling: SamplingParams):
        self._end_ids = model.end_ids
        self._decoder, self._stop = StreamDecoder(model.tokenizer), StopStrings(sampling.stop)
        self.tokens = 0
        self.finish: Literal["end", "stop"] | None = None

    def push(self, token: int) -> str:
        """Returns the text that this token completes."""
        self.tokens += 1
        if token in self._end_ids:
            self.finish = "end"
            return self.flush()
        text = self._stop.push(self._decoder.push(token))
        if self._stop.found:
            self.finish = "stop"
        return text

    def flush(self) -> str:
        """Returns the rest of the text after the last token; "" if it is called again."""
        return "" if self._stop.found else self._stop.push(self._decoder.flush()) + self._stop.flush()


def padded_length(length: int) -> int:
    """Returns the length that a row is padded to, so that rows of similar length share one compiled program."""
    return 64 if length <= 64 else -(-length // 128) * 128  # the kernels of TPUs take multiples of 128


def _sample_tokens(
    logits: FactoredLogits, key: jax.Array, sampling: SamplingParams, partitioner: Partitioner
) -> jax.Array:
    """Samples one token of each row, int32 `[B, 1]`, the same on all devices; the hidden states are `[B, 1, D]`."""
    logits_BV = jax.reshard(jnp.squeeze(logits.materialize(), 1), partitioner.spec("batch", None))
    row_B = jax.reshard(jnp.arange(len(logits_BV)), partitioner.spec("batch"))

    def sample(logits_BV: jax.Array, row_B: jax.Array, key: jax.Array) -> jax.Array:
        if sampling.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        filtered_BV = filter_logits(logits_BV / sampling.temperature, sampling)
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_B)
        return jax.vmap(jax.random.categorical)(keys_B, filtered_BV).astype(jnp.int32)

    rows = partitioner.spec("batch")
    tokens_B = jax.shard_map(sample, in_specs=(P(*rows, None), rows, P()), out_specs=rows)(logits_BV, row_B, key)
    return jax.reshard(tokens_B, P())[:, None]


def filter_logits(logits_BV: jax.Array, limits: SamplingParams) -> jax.Array:
    """Sets the logits of tokens outside the `top_k` (0: all), then the `top_p` and `min_p` likeliest ones to `-inf`."""
    sorted_BV, top_k = jnp.sort(logits_BV, axis=-1, descending=True), limits.top_k
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = jnp.where(logits_BV < sorted_BV[:, top_k - 1 : top_k], -jnp.inf, logits_BV)
        sorted_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < top_k, sorted_BV, -jnp.inf)
    if limits.top_p < 1:
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # Keeps a token if all likelier ones together have less than `top_p`: the one that reaches it is kept, too.
        likelier_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        num_kept_B1 = jnp.sum(likelier_BV < limits.top_p, axis=-1, keepdims=True)
        smallest_B1 = jnp.take_along_axis(sorted_BV, num_kept_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if limits.min_p > 0:
        logits_BV = jnp.where(logits_BV < sorted_BV[:, :1] + math.log(limits.min_p), -jnp.inf, logits_BV)
    return logits_BV
