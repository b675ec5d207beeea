"""Rules that a text must pass to be trained on: how long it is, what it is made of, how much it repeats itself.

The rules are those of MassiveText (Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from
Training Gopher", appendix A.1). A rule without a value is off. Words are what stands between white space; shares of
characters are of those in words.
"""

import itertools
import operator
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import Natural, NonNegative, Share
from jaxinfra.prepare.documents.shingles import run_codes, word_codes

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_MARKS = re.compile(r"#|\.\.\.|\u2026")
_has_bullet = operator.methodcaller("startswith", ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25aa", "\u2013"))
_is_open = operator.methodcaller("endswith", ("...", "\u2026"))
_TOP_RUN, _DUPLICATE_RUN = 2, 5  # words of the shortest runs that are counted (Rae et al. 2021, table A1)


def _rule(measure: Callable[["_Measured"], Any], gopher: Any = None, *, off: tuple[()] | None = None) -> Any:
    """Returns the field of a rule: what its value is compared with, and the value of the paper."""
    return field(default=off, metadata={"measure": measure, "gopher": off if gopher is None else gopher})


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a text must be like; `Filters.gopher()` has the values of the paper. Rules are tried in this order.

    `min_` is the least that passes, `max_` the most. Marks are `#` and ellipses; symbols are no letter, digit or white
    space. Lines and paragraphs are those that are not empty; a duplicate repeats an earlier one. Characters of
    duplicates are among those of all lines or paragraphs, digits and symbols among all of the text. Stop words are in
    lower case, and each counts once. Top runs are the most frequent ones of 2, 3, ... words, if they occur twice;
    duplicate runs, of 5, 6, ... words, repeat an earlier one: both are shares of characters.
    """

    min_chars: Natural | None = _rule(lambda of: len(of.text))
    max_chars: Natural | None = _rule(lambda of: len(of.text))
    min_words: Natural | None = _rule(lambda of: len(of.words), 50)
    max_words: Natural | None = _rule(lambda of: len(of.words), 100_000)
    min_mean_word_chars: NonNegative | None = _rule(lambda of: _share(_chars(of.words), len(of.words)), 3)
    max_mean_word_chars: NonNegative | None = _rule(lambda of: _share(_chars(of.words), len(of.words)), 10)
    max_marks_per_word: NonNegative | None = _rule(lambda of: _share(len(_MARKS.findall(of.text)), len(of.words)), 0.1)
    max_bullet_line_share: Share | None = _rule(lambda of: _share_of(of.lines, _has_bullet), 0.9)
    max_ellipsis_line_share: Share | None = _rule(lambda of: _share_of(of.lines, _is_open), 0.3)
    max_duplicate_line_share: Share | None = _rule(lambda of: _repeated(of.lines, len), 0.3)
    max_duplicate_line_char_share: Share | None = _rule(lambda of: _repeated(of.lines, _chars), 0.2)
    max_duplicate_paragraph_share: Share | None = _rule(lambda of: _repeated(of.paragraphs, len), 0.3)
    max_duplicate_paragraph_char_share: Share | None = _rule(lambda of: _repeated(of.paragraphs, _chars), 0.2)
    min_stop_words: Natural | None = _rule(lambda of: len(of.stop_words.intersection(of.text.lower().split())), 2)
    stop_words: tuple[str, ...] = STOP_WORDS
    max_digit_share: Share | None = _rule(lambda of: _share(_chars(re.findall(r"\d+", of.text)), len(of.text)))
    max_symbol_share: Share | None = _rule(lambda of: _share(_chars(re.findall(r"[^\w\s]+|_+", of.text)), len(of.text)))
    min_alphabetic_word_share: Share | None = _rule(
        lambda of: _share_of(of.words, lambda word: any(map(str.isalpha, word))), 0.8
    )
    max_top_run_shares: tuple[Share, ...] = _rule(lambda of: of.top_run_shares(), (0.20, 0.18, 0.16), off=())
    max_duplicate_run_shares: tuple[Share, ...] = _rule(
        lambda of: of.duplicate_run_shares(), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), off=()
    )

    @classmethod
    def gopher(cls) -> Self:
        """Returns the rules with the values of the paper."""
        return cls(**{name: rule["gopher"] for name, rule in _RULES.items()})

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the rules."""
        for what in ("chars", "words", "mean_word_chars"):
            low, high = f"min_{what}", f"max_{what}"
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                yield Problem(fields=(low, high), message="no text passes both", fix=f"use a smaller {low}")
        known = len(set(self.stop_words))
        if self.min_stop_words is not None and self.min_stop_words > known:
            message = f"there are {known} stop words"
            yield Problem(fields=("min_stop_words", "stop_words"), message=message, fix="use min_stop_words=2")

    def reason(self, text: str) -> str | None:
        """Returns the name of the first rule that a text breaks, cheap rules first; None if it passes all."""
        measured = _Measured(text, self.stop_words)
        for name, rule in _RULES.items():
            limit = getattr(self, name)
            if limit is not None and limit != ():
                value = rule["measure"](measured)
                if isinstance(limit, tuple):
                    broken = any(map(operator.lt, limit, value))
                else:
                    broken = value < limit if name.startswith("min_") else value > limit
                if broken:
                    return name
        return None


_RULES = {rule.name: rule.metadata for rule in fields(Filters) if rule.metadata}


class _Measured:
    """A text in words, lines and paragraphs, which are found when they are asked for."""

    def __init__(self, text: str, stop_words: Sequence[str]):
        self.text, self.stop_words = text, frozenset(stop_words)

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part and not part.isspace()]

    @cached_property
    def codes_N(self) -> np.ndarray:
        return word_codes(self.words)

    @cached_property
    def ends_N(self) -> np.ndarray:
        """Characters of all words before each one, and of all: int64[words + 1]."""
        return np.concatenate([[0], np.cumsum([len(word) for word in self.words], dtype=np.int64)])

    def top_run_shares(self) -> Iterable[float]:
        """Yields the shares of the most frequent runs of 2, 3, ... words, while they are shorter than the text."""
        for n in itertools.count(_TOP_RUN):
            runs = run_codes(self.codes_N, n)
            if len(runs) < 2:
                return
            _, first, times = np.unique(runs, return_index=True, return_counts=True)
            most = int(times.max())
            starts = first[times == most]
            chars = int((self.ends_N[starts + n] - self.ends_N[starts]).max())
            yield _share(most * chars if most > 1 else 0, int(self.ends_N[-1]))

    def duplicate_run_shares(self) -> Iterable[float]:
        """Yields the shares for runs of 5, 6, ... words, until there are none that repeat."""
        for n in itertools.count(_DUPLICATE_RUN):
            runs = run_codes(self.codes_N, n)
            _, first = np.unique(runs, return_index=True)
            if len(first) == len(runs):
                return  # so longer ones do not repeat either
            repeats = np.ones(len(runs), bool)
            repeats[first] = False
            covered = np.zeros(len(self.words) + 1, np.int64)  # +1 where a run begins, -1 behind its end
            covered[:-n][repeats] += 1
            covered[n:][repeats] -= 1
            inside = np.cumsum(covered)[:-1] > 0
            yield _share(int(np.diff(self.ends_N)[inside].sum()), int(self.ends_N[-1]))


def _share(part: float, whole: int) -> float:
    """Part of the whole; an empty whole has none."""
    return part / whole if whole else 0.0


def _share_of(parts: Sequence[str], is_one: Callable[[str], bool]) -> float:
    return _share(sum(map(is_one, parts)), len(parts))


def _repeated(parts: Sequence[str], size: Callable[[Collection[str]], int]) -> float:
    return _share(size(parts) - size(set(parts)), size(parts))


def _chars(parts: Iterable[str]) -> int:
    return len("".join(parts))
