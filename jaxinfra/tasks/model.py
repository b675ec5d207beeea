"""A `Sampler` as a model of lm-eval. Imports lm-eval."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, override

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.sampling import SamplingParams
from jaxinfra.tasks.harness import max_new_tokens

_ROWS = 8  # that a device generates at once


class MeshLM(TemplateLM):
    """Scores and continues texts on all devices; requests of similar length are computed together.

    Contexts that are too long lose their beginning.
    """

    def __init__(self, sampler: Sampler):
        super().__init__()
        self._sampler, self._model = sampler, sampler.model

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
        return self._model.tokenizer.encode(string)

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
            groups.setdefault(_sampling(options), []).append((index, self._model.encode(context)))
        for (sampling, max_tokens), rows in groups.items():
            most = self._model.max_length - max_tokens  # at least 1, see `Tasks.check_room`
            rows.sort(key=lambda row: -len(row[1]))  # so that rows of similar length begin together
            prompts, count = [ids[-most:] for _, ids in rows], _ROWS * self._sampler.rows
            found = self._sampler.completions(prompts, max_tokens=max_tokens, sampling=sampling, rows=count)
            for (index, _), completion in zip(rows, found, strict=True):
                texts[index] = completion.text
        return texts

    def _begin(self, context: list[int]) -> list[int]:
        """Returns a context as it stands in training."""
        first = list(self._model.first_tokens)
        return context if context[: len(first)] == first else [*first, *context]

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


def _sampling(options: Mapping[str, Any]) -> tuple[SamplingParams, int]:
    """Returns how a task samples, and the maximum number of tokens."""
    until = options.get("until") or ()
    stop = tuple([until] if isinstance(until, str) else until)
    temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
    sampling = SamplingParams(
        temperature=temperature,
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 1.0)),
        min_p=float(options.get("min_p", 0.0)),
        stop=tuple(filter(None, stop)),
    )
    return sampling, max_new_tokens(options)
