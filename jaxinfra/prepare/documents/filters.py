"""Quality filters of MassiveText (Rae et al. 2021, "Scaling Language Models: ... Gopher", appendix A.1).

Shape suffix: N words of a text.
"""

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from operator import methodcaller
from typing import Any, Self, override

import numpy as np

from jaxinfra.config import Extensible, Problem
from jaxinfra.config.limits import Fraction, NonNegativeFloat, NonNegativeInt
from jaxinfra.prepare.documents.shingles import ngram_hashes, word_hashes

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_SYMBOLS = re.compile(r"#|\.\.\.|\u2026")
_has_bullet = methodcaller("startswith", ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25aa", "\u2013"))
_has_ellipsis = methodcaller("endswith", ("...", "\u2026"))
_MIN_TOP_NGRAM, _MIN_DUPLICATE_NGRAM = 2, 5  # words (Rae et al. 2021, table A1)


def _rule(measure: Callable[["_TextStats"], object], gopher: object = None, *, off: tuple[()] | None = None) -> Any:
    """Returns a dataclass field for a limit; `measure` computes what is compared with it, `gopher` is the paper's."""
    return field(default=off, metadata={"measure": measure, "gopher": off if gopher is None else gopher})


class Filter(Extensible, ABC):
    """Decides which texts are left out: your own is a frozen dataclass that inherits from this class."""

    @abstractmethod
    def reason(self, text: str) -> str | None:
        """Returns why a text is left out, in one word that is counted; None if it passes."""


@dataclass(frozen=True, kw_only=True)
class Filters(Filter):
    """Rules that a text must pass, tried in this order; `Filters.gopher()` has the values of the paper.

    `min_` is the least value that passes, `max_` the greatest; None and () turn a rule off. Words are separated by
    white space. Empty lines and paragraphs are ignored; a duplicate repeats an earlier one.

    Attributes:
        min_chars: least number of characters.
        max_chars: greatest number of characters.
        min_words: least number of words, which are separated by white space.
        max_words: greatest number of words, which are separated by white space.
        min_mean_word_length: least mean length of the words, in characters.
        max_mean_word_length: greatest mean length of the words, in characters.
        max_symbol_to_word_ratio: greatest number of symbols per word; symbols are `#` and ellipses.
        max_bullet_line_fraction: greatest fraction of the lines that begin with a bullet.
        max_ellipsis_line_fraction: greatest fraction of the lines that end in an ellipsis.
        max_duplicate_line_fraction: greatest fraction of the lines that repeat an earlier one.
        max_duplicate_line_char_fraction: greatest fraction of the characters of all lines that are in lines that
            repeat an earlier one.
        max_duplicate_paragraph_fraction: greatest fraction of the paragraphs that repeat an earlier one.
        max_duplicate_paragraph_char_fraction: greatest fraction of the characters of all paragraphs that are in
            paragraphs that repeat an earlier one.
        min_stop_words: least number of different `stop_words`; each counts once.
        stop_words: the words that `min_stop_words` counts, in lower case.
        max_digit_fraction: greatest fraction of the characters that are digits.
        max_punctuation_fraction: greatest fraction of the characters that are punctuation, which is all but letters,
            digits and white space.
        min_alphabetic_word_fraction: least fraction of the words that have a letter.
        max_top_ngram_fractions: for n-grams of 2, 3, ... words, the greatest fraction of the characters of all words
            that are in the most frequent n-gram, if it occurs twice.
        max_duplicate_ngram_fractions: for n-grams of 5, 6, ... words, the greatest fraction of the characters of all
            words that are in n-grams that repeat an earlier one.
    """

    min_chars: NonNegativeInt | None = _rule(lambda text: len(text.text))
    max_chars: NonNegativeInt | None = _rule(lambda text: len(text.text))
    min_words: NonNegativeInt | None = _rule(lambda text: len(text.words), 50)
    max_words: NonNegativeInt | None = _rule(lambda text: len(text.words), 100_000)
    min_mean_word_length: NonNegativeFloat | None = _rule(lambda text: text.mean_word_length(), 3)
    max_mean_word_length: NonNegativeFloat | None = _rule(lambda text: text.mean_word_length(), 10)
    max_symbol_to_word_ratio: NonNegativeFloat | None = _rule(lambda text: text.symbol_to_word_ratio(), 0.1)
    max_bullet_line_fraction: Fraction | None = _rule(lambda text: _fraction_of(text.lines, _has_bullet), 0.9)
    max_ellipsis_line_fraction: Fraction | None = _rule(lambda text: _fraction_of(text.lines, _has_ellipsis), 0.3)
    max_duplicate_line_fraction: Fraction | None = _rule(lambda text: _repeated(text.lines, len), 0.3)
    max_duplicate_line_char_fraction: Fraction | None = _rule(lambda text: _repeated(text.lines, _chars), 0.2)
    max_duplicate_paragraph_fraction: Fraction | None = _rule(lambda text: _repeated(text.paragraphs, len), 0.3)
    max_duplicate_paragraph_char_fraction: Fraction | None = _rule(lambda text: _repeated(text.paragraphs, _chars), 0.2)
    min_stop_words: NonNegativeInt | None = _rule(lambda text: len(text.stop_words & {*text.text.lower().split()}), 2)
    stop_words: tuple[str, ...] = STOP_WORDS
    max_digit_fraction: Fraction | None = _rule(lambda text: text.char_fraction(r"\d+"))
    max_punctuation_fraction: Fraction | None = _rule(lambda text: text.char_fraction(r"[^\w\s]+|_+"))
    min_alphabetic_word_fraction: Fraction | None = _rule(lambda text: _fraction_of(text.words, _has_letter), 0.8)
    max_top_ngram_fractions: tuple[Fraction, ...] = _rule(lambda text: text.top_ngrams(), (0.20, 0.18, 0.16), off=())
    max_duplicate_ngram_fractions: tuple[Fraction, ...] = _rule(
        lambda text: text.duplicate_ngrams(), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), off=()
    )

    @classmethod
    def gopher(cls) -> Self:
        """Returns the rules with the values of the paper."""
        return cls(**{name: rule["gopher"] for name, rule in _RULES.items()})

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the rules."""
        for what in ("chars", "words", "mean_word_length"):
            low, high = f"min_{what}", f"max_{what}"
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                yield Problem(fields=(low, high), message="no text passes both", fix=f"use a smaller {low}")
        known = len(set(self.stop_words))
        if self.min_stop_words is not None and self.min_stop_words > known:
            message = f"there are only {known} stop words"
            yield Problem(fields=("min_stop_words", "stop_words"), message=message, fix="use min_stop_words=2")

    @override
    def reason(self, text: str) -> str | None:
        """Returns the name of the first rule that a text breaks; None if it passes all."""
        stats = _TextStats(text, self.stop_words)
        for name, rule in _RULES.items():
            limit = getattr(self, name)
            if limit is None or limit == ():
                continue
            value = rule["measure"](stats)
            if isinstance(limit, tuple):  # n-gram rules: one limit for each n, as far as there are limits and values
                is_broken = any(measured > allowed for allowed, measured in zip(limit, value, strict=False))
            else:
                is_broken = value < limit if name.startswith("min_") else value > limit
            if is_broken:
                return name
        return None


_RULES = {rule.name: rule.metadata for rule in fields(Filters) if rule.metadata}


class _TextStats:
    """Statistics of a text, each computed when the first rule needs it."""

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
    def hashes_N(self) -> np.ndarray:
        return word_hashes(self.words)

    @cached_property
    def char_offsets(self) -> np.ndarray:
        """Characters of all words before each word, and of all words: int64[words + 1]."""
        return np.concatenate([[0], np.cumsum([len(word) for word in self.words], dtype=np.int64)])

    def mean_word_length(self) -> float:
        return _fraction(_chars(self.words), len(self.words))

    def symbol_to_word_ratio(self) -> float:
        return _fraction(len(_SYMBOLS.findall(self.text)), len(self.words))

    def char_fraction(self, pattern: str) -> float:
        """Returns the fraction of characters that match a pattern."""
        return _fraction(_chars(re.findall(pattern, self.text)), len(self.text))

    def top_ngrams(self) -> Iterable[float]:
        """Yields the fraction of the most frequent n-gram of 2, 3, ... words, as long as the text has two."""
        for n in itertools.count(_MIN_TOP_NGRAM):
            ngrams = ngram_hashes(self.hashes_N, n)
            if len(ngrams) < 2:
                return
            _, first_words, counts = np.unique(ngrams, return_index=True, return_counts=True)
            most = int(counts.max())
            starts = first_words[counts == most]  # several n-grams may occur equally often: the longest one counts
            chars = int((self.char_offsets[starts + n] - self.char_offsets[starts]).max())
            yield _fraction(most * chars if most > 1 else 0, int(self.char_offsets[-1]))

    def duplicate_ngrams(self) -> Iterable[float]:
        """Yields the fractions of n-grams of 5, 6, ... words that repeat, until none does."""
        for n in itertools.count(_MIN_DUPLICATE_NGRAM):
            ngrams = ngram_hashes(self.hashes_N, n)
            _, first_words = np.unique(ngrams, return_index=True)
            if len(first_words) == len(ngrams):
                return  # longer ones cannot repeat either
            repeats = np.ones(len(ngrams), bool)
            repeats[first_words] = False
            # Sums +1 where a repeating n-gram begins and -1 after its end, so words inside have a positive sum.
            changes = np.zeros(len(self.words) + 1, np.int64)
            changes[:-n][repeats] += 1
            changes[n:][repeats] -= 1
            is_covered = np.cumsum(changes)[:-1] > 0
            yield _fraction(int(np.diff(self.char_offsets)[is_covered].sum()), int(self.char_offsets[-1]))


def _fraction(part: float, whole: int) -> float:
    return part / whole if whole else 0.0


def _fraction_of(parts: Sequence[str], predicate: Callable[[str], bool]) -> float:
    return _fraction(sum(map(predicate, parts)), len(parts))


def _repeated(parts: Sequence[str], size: Callable[[Collection[str]], int]) -> float:
    """Returns the fraction of parts that repeat an earlier one, by number (`size=len`) or characters (`_chars`)."""
    return _fraction(size(parts) - size(set(parts)), size(parts))


def _has_letter(word: str) -> bool:
    return any(map(str.isalpha, word))


def _chars(parts: Iterable[str]) -> int:
    return len("".join(parts))
