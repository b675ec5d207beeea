"""Decodes many prompts in the rows of one cache: a row whose text has ended takes the next prompt.

All processes make the same calls and get the same tokens. A token depends on its prompt, and if it is sampled also on
the seed, the index of the prompt and the number of tokens before it; not on the row, nor on what is in other rows.

Shape suffixes: B rows of the cache, N rows that begin together, T length.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxinfra.inference.language_model import require_text
from jaxinfra.inference.sampling import SamplingParams, sample_tokens
from jaxinfra.inference.unrolled import unrolled
from jaxinfra.models.decoder import Cache, Transformer
from jaxinfra.models.low_rank import using_columns
from jaxinfra.parallel.spec import Params
from jaxinfra.program import Program


@dataclass(kw_only=True)
class _Text:
    """A prompt in a row, with the tokens after it.

    Attributes:
        index: index of the text.
        prompt: index of the prompt.
        adapter: index of the adapter.
        ids: its tokens, and those after it that have arrived.
        limit: maximum number of tokens after it.
        begun: number of tokens that the devices were asked for.
        ended: whether further tokens have no meaning.
    """

    index: int
    prompt: int
    adapter: int
    ids: list[int]
    limit: int
    begun: int = 0
    ended: bool = False


class _RowInfo(NamedTuple):
    """Numbers of the texts in rows, int32 `[B]`.

    Attributes:
        counts: number of tokens to read; a row with 0 keeps its cache.
        indices: indices of the prompts.
        steps: number of tokens that were sampled before.
        adapters: indices of the adapters.
    """

    counts: ArrayLike
    indices: ArrayLike
    steps: ArrayLike
    adapters: ArrayLike


class Decoder:
    """Decodes with the model of a program that was made by `sampling_program`.

    Where its adapter is made of several, `columns` says which ones of its columns are whose, bool `[adapters, R]`.
    """

    def __init__(self, program: Program, columns: np.ndarray | None = None):
        self._columns = columns
        self._program, self._unroll = unrolled(program)
        self._config = require_text(program.run)[0]
        self._shards = program.partitioner.num_shards("batch")

    def prepare(self, params: Params) -> Params:
        """Returns what `decode` takes for the parameters of the program: themselves, or on CPUs a copy."""
        with self._program.on_mesh:
            return self._unroll(params)

    def decode(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: SamplingParams,
        *,
        rows: int,
        ends: Callable[[int, int], bool],
        adapters: Sequence[int] = (0,),
    ) -> Iterator[tuple[int, int]]:
        """Yields the index of a text and its next token, in the order of the tokens of each text.

        A text is a prompt with one of the adapters; those of the first prompt are first.

        Args:
            params: see `prepare`.
            prompts: prompts of at least one token.
            limits: the maximum number of tokens after each prompt, at least one.
            sampling: how tokens are sampled.
            rows: the number of texts that are decoded at once, rounded up to a multiple of the shards of a batch.
            ends: takes what is yielded next; returns whether this token ends its text.
            adapters: indices of the adapters that each prompt is continued with, if there are several.
        """
        pairs = product(enumerate(zip(prompts, limits, strict=True)), adapters)
        waiting = deque(
            _Text(index=index, prompt=prompt, adapter=adapter, ids=[*ids], limit=limit)
            for index, ((prompt, (ids, limit)), adapter) in enumerate(pairs)
        )
        longest = max(len(text.ids) + text.limit for text in waiting)
        texts: list[_Text | None] = [None] * (-(-min(rows, len(waiting)) // self._shards) * self._shards)
        # With LongRoPE a row that becomes this long gets other rotary positions, from its first token on.
        switches = {length + 1 for length in self._config.short_lengths}
        sampling, seed = replace(sampling, seed=0, stop=()), sampling.seed  # one compiled program serves all
        with self._program.on_mesh:
            key = jax.random.key(seed)
            tokens, cache = self._empty(len(texts), padded_length(longest))
        arriving: deque[tuple[jax.Array, dict[int, _Text]]] = deque()  # tokens of rows, with the texts in these rows
        while waiting or arriving or any(texts):
            at_once = self._shards if any(texts) else len(texts)
            for row, text in enumerate(texts):
                if text is None and waiting:
                    texts[row] = waiting.popleft()
            present = {row: text for row, text in enumerate(texts) if text is not None}
            new = [row for row, text in present.items() if not text.begun or len(text.ids) in switches][:at_once]
            asked = {row: present[row] for row in new} or present
            if asked:
                with self._program.on_mesh:
                    state = (params, cache, tokens, key, sampling)
                    tokens, cache = self._begin(*state, asked, at_once) if new else self._go_on(*state, asked)
                arriving.append((tokens, asked))
            for row, text in asked.items():
                text.begun += 1
                if text.begun == text.limit:
                    texts[row] = None
            # The devices work on the next tokens while these arrive.
            while len(arriving) > (0 if switches or not asked else 1):
                found, of_rows = arriving.popleft()
                tokens_B = np.asarray(found)[:, 0].tolist()
                for row, text in of_rows.items():
                    if text.ended:
                        continue
                    text.ids.append(tokens_B[row])
                    text.ended = ends(text.index, tokens_B[row])
                    if text.ended and texts[row] is text:
                        texts[row] = None
                    yield text.index, tokens_B[row]

    def _go_on(
        self,
        params: Params,
        cache: Cache,
        tokens_B1: jax.Array,
        key: jax.Array,
        sampling: SamplingParams,
        texts: Mapping[int, _Text],
    ) -> tuple[jax.Array, Cache]:
        """Adds the last token of each text to the cache; returns the tokens of all rows, and the cache."""
        numbers_4B = np.zeros((4, len(tokens_B1)), np.int32)
        for row, text in texts.items():
            numbers_4B[:, row] = 1, text.prompt, text.begun, text.adapter
        return self._next_tokens(params, cache, tokens_B1, _RowInfo(*numbers_4B), key, sampling)

    def _begin(
        self,
        params: Params,
        cache: Cache,
        tokens_B1: jax.Array,
        key: jax.Array,
        sampling: SamplingParams,
        texts: Mapping[int, _Text],
        count: int,
    ) -> tuple[jax.Array, Cache]:
        """Adds texts of which the cache has nothing, at most `count`; returns as `_go_on`."""
        rows = [text.ids for text in texts.values()]
        length = padded_length(max(map(len, rows)))
        length = min(length, self._config.learned_positions or length)
        ids_NT, counts_N = pad_rows(rows, length, count)
        indices_N, steps_N, adapters_N, rows_N = np.zeros((4, count), np.int32)
        rows_N[len(rows) :] = len(tokens_B1)  # no row
        for n, (row, text) in enumerate(texts.items()):
            rows_N[n], indices_N[n], steps_N[n], adapters_N[n] = row, text.prompt, text.begun, text.adapter
        info = _RowInfo(counts_N, indices_N, steps_N, adapters_N)
        return self._first_tokens(params, cache, tokens_B1, ids_NT, rows_N, info, key, sampling)

    @partial(jax.jit, static_argnums=(0, 1, 2))
    def _empty(self, rows: int, length: int) -> tuple[jax.Array, Cache]:
        """Returns tokens `[B, 1]` and a cache."""
        model = self._program.module
        assert isinstance(model, Transformer)
        return jnp.zeros((rows, 1), jnp.int32), model.empty_cache(rows, length)

    @partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
    def _next_tokens(
        self,
        params: Params,
        cache: Cache,
        tokens_BT: jax.Array,
        info: _RowInfo,
        key: jax.Array,
        sampling: SamplingParams,
    ) -> tuple[jax.Array, Cache]:
        """Adds tokens of each row to the cache; returns the tokens that follow, `[B, 1]`, and the cache."""
        partitioner, model = self._program.partitioner, self._program.model(params)
        assert isinstance(model, Transformer)
        counts_B = jax.reshard(info.counts, partitioner.spec("batch"))
        with using_columns(None if self._columns is None else jnp.asarray(self._columns)[info.adapters]):
            logits, cache = model.decode(tokens_BT, cache, counts_B)
        if tokens_BT.shape[1] > 1:  # the last hidden state of each row is cut out before it is multiplied with the head
            last = jax.vmap(lambda x_TD, count: jax.lax.dynamic_slice_in_dim(x_TD, count - 1, 1))
            logits = replace(logits, hidden=partitioner.map_local(last, logits.hidden, counts_B))
        return sample_tokens(logits, key, info.indices, info.steps, sampling, partitioner), cache

    @partial(jax.jit, static_argnums=(0, 8), donate_argnums=2)
    def _first_tokens(
        self,
        params: Params,
        cache: Cache,
        tokens_B1: jax.Array,
        ids_NT: jax.Array,
        rows_N: jax.Array,
        info: _RowInfo,
        key: jax.Array,
        sampling: SamplingParams,
    ) -> tuple[jax.Array, Cache]:
        """Decodes prompts in a cache of their own, and puts them into rows of the cache; returns as `_next_tokens`."""
        _, empty = self._empty(*ids_NT.shape)
        new_N1, new = self._next_tokens(params, empty, ids_NT, info, key, sampling)
        put = partial(self._put_rows, rows_N=rows_N)
        layers = jax.tree.map(partial(put, dim=1), cache.layers, new.layers)
        tokens_B1 = tokens_B1.at[rows_N].set(new_N1, mode="drop")
        return tokens_B1, Cache(layers, put(cache.lengths, new.lengths, dim=0))

    def _put_rows(self, old: jax.Array, new: jax.Array, *, rows_N: jax.Array, dim: int) -> jax.Array:
        """Replaces rows of an array whose dimension `dim` is sharded like a batch; `new` may have fewer slots."""
        spec, axes = jax.typeof(old).sharding.spec, self._program.partitioner.mesh_axes("batch")
        parts = spec.partitions
        everywhere = P(*parts[:dim], None, *parts[dim + 1 :])

        def on_device(old: jax.Array, new: jax.Array, rows_N: jax.Array) -> jax.Array:
            count = old.shape[dim]
            rows_N -= jax.lax.axis_index(axes) * count if axes else 0
            rows_N = jnp.where(rows_N < 0, count, rows_N)  # those of other devices are dropped
            return old.at[(*[slice(None)] * dim, rows_N, *map(slice, new.shape[dim + 1 :]))].set(new, mode="drop")

        specs = (spec, everywhere, P())
        return jax.shard_map(on_device, in_specs=specs, out_specs=spec)(old, jax.reshard(new, everywhere), rows_N)


def pad_rows(rows: Sequence[Sequence[int]], length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens `[count, length]` and the number of tokens of each row `[count]`, 1 where there is none."""
    tokens_NT, counts_N = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    for row, ids in enumerate(rows):
        tokens_NT[row, : len(ids)], counts_N[row] = ids, len(ids)
    return tokens_NT, counts_N


def padded_length(length: int) -> int:
    """Returns the length that a row is padded to, so that rows of similar length share one compiled program."""
    return 64 if length <= 64 else -(-length // 128) * 128  # the kernels of TPUs take multiples of 128
