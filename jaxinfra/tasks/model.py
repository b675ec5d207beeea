"""A `Sampler` as a model of lm-eval. Imports lm-eval.

Scores and texts are those of lm-eval's own model class for transformers, `HFLM`.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, override

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxinfra.errors import ConfigError
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.sampling import SamplingParams
from jaxinfra.tasks.harness import Render, max_new_tokens

_log = logging.getLogger(__name__)

_ROWS = 8  # that a device generates at once


class MeshLM(TemplateLM):
    """Scores and continues texts on all devices; requests of similar length are computed together.

    Contexts that are too long lose their beginning. Special tokens in texts, which chat templates write, are tokens.
    """

    def __init__(self, sampler: Sampler, render: Render | None = None):
        super().__init__()
        self._sampler, self._model, self._render = sampler, sampler.model, render
        self._leaves_out_system = False

    @property
    @override
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the one that begins texts, or else that ends documents."""
        return [self.eot_token_id, *self._model.first_tokens][-1]

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokenizer, ids = self._model.tokenizer, list[int]()
        for index, part in enumerate(tokenizer.split(string)):
            ids += [part] if isinstance(part, int) else tokenizer.encode(part, continuation=index > 0)
        return ids

    @property
    @override
    def tokenizer_name(self) -> str:
        return ""  # a key of a cache that is not used

    @override
    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation; leaves the system message out if the template has no place for it."""
        assert self._render is not None
        try:
            return self._render(chat_history, not add_generation_prompt)
        except ConfigError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            if not self._leaves_out_system:
                _log.warning("%s; until then system messages and descriptions of tasks are left out", error)
            self._leaves_out_system = True
        return self.apply_chat_template(others, add_generation_prompt)

    @override
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    @override
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score((self._begin(context), continuation) for _, context, continuation in requests)

    @override
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.arguments[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self._model.max_length, context_len=1):
                windows.append(make_disjoint_window(pair))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += log_prob
        return totals

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        texts, groups = [""] * len(requests), {}
        for index, request in enumerate(requests):
            context, options = request.arguments
            groups.setdefault(sampling_of(options), []).append((index, self._begin(self.tok_encode(context))))
        for (sampling, max_tokens), rows in groups.items():
            most = self._model.max_length - max_tokens  # at least 1, see `Tasks.check_room`
            rows.sort(key=lambda row: -len(row[1]))  # so that rows of similar length begin together
            prompts, count = [ids[-most:] for _, ids in rows], _ROWS * self._sampler.rows
            found = self._sampler.completions(prompts, max_tokens=max_tokens, sampling=sampling, rows=count)
            for (index, _), completion in zip(rows, found, strict=True):
                texts[index] = completion.text
        return texts

    def _begin(self, context: list[int]) -> list[int]:
        """Returns a context of at least one token as it stands in training."""
        first = list(self._model.first_tokens)
        return (context if context[: len(first)] == first else [*first, *context]) or [self.eot_token_id]

    def _score(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is the greedy one."""
        rows, counts = [], []
        for context, continuation in pairs:
            row = [*context, *continuation][-self._model.max_length - 1 :]
            rows.append(row)
            counts.append(min(len(continuation), len(row) - 1))
        found = []
        for scores, count in zip(self._sampler.scores(rows), counts, strict=True):
            first = len(scores.log_probs) - count
            found.append((float(scores.log_probs[first:].sum(dtype=float)), bool(scores.likeliest[first:].all())))
        return found


def sampling_of(options: Mapping[str, Any]) -> tuple[SamplingParams, int]:
    """Returns how a task samples, and the maximum number of tokens."""
    until = options.get("until") or ()
    stop = tuple([until] if isinstance(until, str) else until)
    do_sample, temperature = options.get("do_sample"), options.get("temperature")
    if do_sample is None:  # then a temperature says so
        do_sample = bool(temperature)
    sampling = SamplingParams(
        temperature=0.0 if not do_sample else 1.0 if temperature is None else float(temperature),
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 1.0)),
        min_p=float(options.get("min_p", 0.0)),
        stop=tuple(filter(None, stop)),
    )
    return sampling, max_new_tokens(options)
