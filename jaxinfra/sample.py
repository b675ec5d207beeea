"""Samples text from a trained language model with a KV cache, streamed token by token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxinfra.config import load
from jaxinfra.config.classes import ClassFinder
from jaxinfra.data.tokenizer import StreamDecoder, Tokenizer
from jaxinfra.errors import ConfigError
from jaxinfra.language_model import require_text
from jaxinfra.models.decoder import Cache, Transformer
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import Params
from jaxinfra.program import Program
from jaxinfra.run import Run
from jaxinfra.track.runs import parse_source, record_of
from jaxinfra.trained_params import load_params

_PROMPT_TOKENS = 100  # that follow `track.sample_prompt`

PROMPT_BLOCK = 64
"""Prompts are padded to a multiple of this, so that prompts of similar length share one compiled program."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: samples from this number of likeliest tokens; 0 is all.
        top_p: samples from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        seed: seed of the random numbers.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"--temperature {self.temperature}: must not be negative; use --temperature 0.8")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k}: must not be negative; use --top-k 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1; use --top-p 1 for all tokens")


class Sampler:
    """A language model with its parameters on one device, and its tokenizer."""

    def __init__(self, program: Program, params: Params):
        """Binds the parameters, which must be on the mesh of the program, made by `sampling_program`."""
        self._program, self._params = program, params
        self._config, data = require_text(program.run)
        self._tokenizer: Tokenizer = data.open().tokenizer
        self._mask_documents = data.mask_documents

    @staticmethod
    def check(run: Run) -> None:
        """Raises ConfigError if a run trains no language model."""
        require_text(run)

    @classmethod
    def from_run(cls, run_dir: str | Path, imports: Sequence[str] | ClassFinder = ()) -> Self:
        """Loads a language model from a run: its newest checkpoint, or the one of a step with `runs/NAME@STEP`.

        Takes the averaged parameters if the run keeps them.
        """
        path, _ = parse_source(run_dir)
        program = sampling_program(load(record_of(path), (), Run, imports).run)
        return cls(program, load_params(run_dir, program).params)

    @classmethod
    def from_params(cls, run: Run, params: Params) -> Self:
        """Copies parameters, which may be on any mesh, to the first device."""
        sampler = cls(sampling_program(run), params)
        sampler.set_params(params)
        return sampler

    def set_params(self, params: Params) -> None:
        """Copies other parameters of the same model, which may be on any mesh, to the first device of this process.

        If they are on the devices of several processes, all processes must call it.
        """
        if jax.process_count() > 1:
            params = jax.tree.map(lambda array: array.addressable_data(0), _replicate(params))
        self._params = jax.device_put(params, jax.tree.map(lambda p: p.sharding, self._program.params))

    def stream(self, prompt: str, *, max_tokens: int, sampling: SamplingParams) -> Iterator[str]:
        """Yields the continuation in pieces of whole characters, as soon as they are decoded.

        Ends after `max_tokens`, or at the end of the document.
        """
        decoder = StreamDecoder(self._tokenizer)
        for token in self.tokens(self._tokenizer.encode(prompt), max_tokens=max_tokens, sampling=sampling):
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.flush():
            yield rest

    def continue_prompt(self, prompt: str) -> str:
        """Returns a prompt of `track.sample_prompt` with 100 tokens after it; ConfigError if they do not fit."""
        room = self.room_after(prompt)
        if room is not None and room < _PROMPT_TOKENS:
            raise ConfigError(
                f"{_PROMPT_TOKENS} tokens must fit after the prompt, but learned positions leave {room}; "
                "use track.sample_prompt=none, or a shorter prompt"
            )
        return prompt + "".join(self.stream(prompt, max_tokens=_PROMPT_TOKENS, sampling=SamplingParams()))

    def room_after(self, prompt: str) -> int | None:
        """Returns how many tokens fit after a prompt, at least 0; None if the model has no learned positions."""
        max_positions = self._config.learned_positions
        if max_positions is None:
            return None
        return max(0, max_positions - len(self._with_first_token(self._tokenizer.encode(prompt))))

    def _with_first_token(self, prompt: list[int]) -> list[int]:
        # In training, the end-of-document token of the previous document comes before a document, unless documents are
        # masked from each other.
        return prompt if prompt and self._mask_documents else [self._tokenizer.eot_id, *prompt]

    def tokens(self, prompt: list[int], *, max_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        """Yields the token ids of the continuation, without the end-of-document token.

        Raises ConfigError if prompt and continuation are longer than the model's learned positions.
        """
        ids = self._with_first_token(prompt)
        slots = -(-len(ids) // PROMPT_BLOCK) * PROMPT_BLOCK
        max_positions = self._config.learned_positions
        if max_positions is not None:
            if len(ids) + max_tokens > max_positions:
                room = max_positions - len(ids)
                raise ConfigError(
                    f"--max-tokens {max_tokens}: with a prompt of {len(ids)} tokens it exceeds the {max_positions} "
                    f"learned positions of the model; use {f'--max-tokens {room}' if room > 0 else 'a shorter prompt'}"
                )
            slots = min(slots, max_positions)
        with self._program.on_mesh:
            key = jax.random.key(sampling.seed)
            # First the padded prompt, then one token at a time.
            tokens_1T, count = jnp.array([ids + [0] * (slots - len(ids))], jnp.int32), len(ids)
            cache = self._model(self._params).empty_cache(1, max(slots, len(ids) + max_tokens))
            for num_sampled in range(max_tokens):
                step_key = jax.random.fold_in(key, num_sampled) if num_sampled else key
                token_11, cache = self._next_token(self._params, cache, tokens_1T, count, step_key, sampling)
                token_id = int(token_11[0, 0])
                if token_id == self._tokenizer.eot_id:
                    return
                yield token_id
                tokens_1T, count = token_11, 1

    def _model(self, params: Params) -> Transformer:
        model = self._program.model(params)
        assert isinstance(model, Transformer)
        return model

    @partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
    def _next_token(
        self,
        params: Params,
        cache: Cache,
        tokens_BT: jax.Array,
        count: int | jax.Array,
        key: jax.Array,
        sampling: SamplingParams,
    ) -> tuple[jax.Array, Cache]:
        """Appends the first `count` tokens to the cache, since others pad a prompt.

        Returns the token that follows, `[B, 1]`, and the cache.
        """
        logits, cache = self._model(params).decode(tokens_BT, cache, count)
        last_BD = jax.lax.dynamic_index_in_dim(logits.hidden, count - 1, axis=1, keepdims=False)
        return _sample_token(replace(logits, hidden=last_BD), key, sampling), cache


def sampling_program(run: Run) -> Program:
    """Returns the program of a language model's run on the first device, with default compiler options.

    It is not in canonical mode, in which each device applies the model to its own rows alone.
    """
    require_text(run)
    mesh = MeshConfig(fsdp=1)
    run = replace(run, mesh=mesh, train=replace(run.train, compiler="default", canonical=None))
    return Program(run, make_mesh(mesh, jax.local_devices()[:1]))


def _replicate(params: Params) -> Params:
    """Copies arrays to all devices of their mesh: a collective operation."""
    sharding = jax.tree.leaves(params)[0].sharding
    assert isinstance(sharding, NamedSharding)
    return _replicated_on(sharding.mesh)(params)


@cache
def _replicated_on(mesh: Mesh | AbstractMesh) -> Callable[[Params], Params]:
    return jax.jit(lambda params: params, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _sample_token(logits: FactoredLogits, key: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Samples one token per row, int32 `[B, 1]`; the hidden states are `[B, D]`."""
    logits_BV = logits.materialize()
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)[:, None]
    logits_BV = filter_top_k_top_p(logits_BV / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)[:, None]


def filter_top_k_top_p(logits_BV: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
    """Sets the logits of tokens outside the `top_k` (0: all) and the `top_p` likeliest ones to `-inf`."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = jnp.where(logits_BV < sorted_BV[:, top_k - 1 : top_k], -jnp.inf, logits_BV)
        sorted_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < top_k, sorted_BV, -jnp.inf)
    if top_p < 1:
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # Keeps a token if all likelier ones together have less than `top_p`: the one that reaches it is kept, too.
        likelier_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        num_kept_B1 = jnp.sum(likelier_BV < top_p, axis=-1, keepdims=True)
        smallest_B1 = jnp.take_along_axis(sorted_BV, num_kept_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return logits_BV
