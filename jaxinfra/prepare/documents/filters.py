"""Rules that a text must pass to be trained on: how long it is, what it is made of, how much it repeats itself.

The rules are those of MassiveText (Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from
Training Gopher", appendix A.1). A rule without a value is off. Words are what stands between white space; shares of
characters are of those in words.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import Natural, NonNegative, Share
from jaxinfra.prepare.documents.shingles import run_codes, word_codes

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_DIGITS = re.compile(r"\d+")
_SYMBOLS = re.compile(r"[^\w\s]+|_+")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25aa", "\u2013")
_TOP_RUN, _DUPLICATE_RUN = 2, 5  # words of the shortest runs that are counted (Rae et al. 2021, table A1)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a text must be like; `Filters.gopher()` has the values of the paper.

    Attributes:
        min_chars: characters at least.
        max_chars: characters at most.
        min_words: words at least.
        max_words: words at most.
        min_mean_word_chars: mean characters of a word at least.
        max_mean_word_chars: mean characters of a word at most.
        max_digit_share: digits among its characters, white space included.
        max_symbol_share: characters that are no letter, digit or white space among all.
        max_marks_per_word: `#` and ellipses for every word.
        min_alphabetic_word_share: words with a letter among all.
        min_stop_words: how many of `stop_words` it has, each counted once.
        stop_words: in lower case.
        max_bullet_line_share: lines that begin with a bullet among those that are not empty.
        max_ellipsis_line_share: lines that end with an ellipsis among those that are not empty.
        max_duplicate_line_share: lines that repeat an earlier one among those that are not empty.
        max_duplicate_line_char_share: characters of such lines among those of all lines.
        max_duplicate_paragraph_share: paragraphs that repeat an earlier one.
        max_duplicate_paragraph_char_share: characters of such paragraphs among those of all paragraphs.
        max_top_run_shares: characters in the most frequent run of 2, 3, ... words, if it occurs twice.
        max_duplicate_run_shares: characters in runs of 5, 6, ... words that repeat an earlier one.
    """

    min_chars: Natural | None = None
    max_chars: Natural | None = None
    min_words: Natural | None = None
    max_words: Natural | None = None
    min_mean_word_chars: NonNegative | None = None
    max_mean_word_chars: NonNegative | None = None
    max_digit_share: Share | None = None
    max_symbol_share: Share | None = None
    max_marks_per_word: NonNegative | None = None
    min_alphabetic_word_share: Share | None = None
    min_stop_words: Natural | None = None
    stop_words: tuple[str, ...] = STOP_WORDS
    max_bullet_line_share: Share | None = None
    max_ellipsis_line_share: Share | None = None
    max_duplicate_line_share: Share | None = None
    max_duplicate_line_char_share: Share | None = None
    max_duplicate_paragraph_share: Share | None = None
    max_duplicate_paragraph_char_share: Share | None = None
    max_top_run_shares: tuple[Share, ...] = ()
    max_duplicate_run_shares: tuple[Share, ...] = ()

    @classmethod
    def gopher(cls) -> Self:
        """The rules and values of Rae et al. 2021, appendix A.1 and table A1."""
        return cls(
            min_words=50,
            max_words=100_000,
            min_mean_word_chars=3,
            max_mean_word_chars=10,
            max_marks_per_word=0.1,
            min_alphabetic_word_share=0.8,
            min_stop_words=2,
            max_bullet_line_share=0.9,
            max_ellipsis_line_share=0.3,
            max_duplicate_line_share=0.3,
            max_duplicate_line_char_share=0.2,
            max_duplicate_paragraph_share=0.3,
            max_duplicate_paragraph_char_share=0.2,
            max_top_run_shares=(0.20, 0.18, 0.16),
            max_duplicate_run_shares=(0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
        )

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the rules."""
        for low, high in (
            ("min_chars", "max_chars"),
            ("min_words", "max_words"),
            ("min_mean_word_chars", "max_mean_word_chars"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                yield Problem(fields=(low, high), message="no text passes both", fix=f"use a smaller {low}")
        if self.min_stop_words is not None and self.min_stop_words > len(set(self.stop_words)):
            yield Problem(
                fields=("min_stop_words", "stop_words"),
                message=f"there are {len(set(self.stop_words))} stop words",
                fix="use min_stop_words=2",
            )

    def reason(self, text: str) -> str | None:
        """The name of the first rule that a text breaks, cheap rules first; None if it passes all."""
        measured = _Measured(text, self.stop_words)
        for rule, measure in _MEASURES.items():
            limit = getattr(self, rule)
            if limit is not None:
                value = measure(measured)
                if value < limit if rule.startswith("min_") else value > limit:
                    return rule
        if any(map(_above, measured.top_run_shares(len(self.max_top_run_shares)), self.max_top_run_shares)):
            return "max_top_run_shares"
        shares = measured.duplicate_run_shares(len(self.max_duplicate_run_shares))
        return "max_duplicate_run_shares" if any(map(_above, shares, self.max_duplicate_run_shares)) else None


class _Measured:
    """A text and what is measured of it, when it is asked for."""

    def __init__(self, text: str, stop_words: Sequence[str]):
        self.text = text
        self._stop_words = frozenset(stop_words)

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in _PARAGRAPHS.split(self.text) if part and not part.isspace()]

    @cached_property
    def codes_N(self) -> np.ndarray:
        return word_codes(self.words)

    @cached_property
    def ends_N(self) -> np.ndarray:
        """Characters of all words before each one, and of all: int64[words + 1]."""
        return np.concatenate([[0], np.cumsum(np.fromiter(map(len, self.words), np.int64, len(self.words)))])

    def mean_word_chars(self) -> float:
        return _share(sum(map(len, self.words)), len(self.words))

    def digit_share(self) -> float:
        return _share(sum(map(len, _DIGITS.findall(self.text))), len(self.text))

    def symbol_share(self) -> float:
        return _share(sum(map(len, _SYMBOLS.findall(self.text))), len(self.text))

    def marks_per_word(self) -> float:
        marks = self.text.count("#") + self.text.count("...") + self.text.count("\u2026")
        return _share(marks, len(self.words))

    def alphabetic_word_share(self) -> float:
        return _share(sum(word.isalpha() or any(map(str.isalpha, word)) for word in self.words), len(self.words))

    def stop_words(self) -> int:
        return len(self._stop_words.intersection(self.text.lower().split()))

    def bullet_line_share(self) -> float:
        return _share(sum(line.startswith(_BULLETS) for line in self.lines), len(self.lines))

    def ellipsis_line_share(self) -> float:
        return _share(sum(line.endswith(("...", "\u2026")) for line in self.lines), len(self.lines))

    def top_run_shares(self, count: int) -> Iterable[float]:
        """Yields the shares for runs of 2, 3, ... words."""
        for n in range(_TOP_RUN, _TOP_RUN + count):
            runs = run_codes(self.codes_N, n)
            if len(runs) < 2:
                return
            _, first, times = np.unique(runs, return_index=True, return_counts=True)
            most = int(times.max())
            starts = first[times == most]
            chars = int((self.ends_N[starts + n] - self.ends_N[starts]).max())
            yield _share(most * chars if most > 1 else 0, int(self.ends_N[-1]))

    def duplicate_run_shares(self, count: int) -> Iterable[float]:
        """Yields the shares for runs of 5, 6, ... words, until there are none that repeat."""
        for n in range(_DUPLICATE_RUN, _DUPLICATE_RUN + count):
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


_MEASURES: dict[str, Callable[[_Measured], float]] = {
    "min_chars": lambda measured: len(measured.text),
    "max_chars": lambda measured: len(measured.text),
    "min_words": lambda measured: len(measured.words),
    "max_words": lambda measured: len(measured.words),
    "min_mean_word_chars": _Measured.mean_word_chars,
    "max_mean_word_chars": _Measured.mean_word_chars,
    "max_marks_per_word": _Measured.marks_per_word,
    "max_bullet_line_share": _Measured.bullet_line_share,
    "max_ellipsis_line_share": _Measured.ellipsis_line_share,
    "max_duplicate_line_share": lambda measured: _repeated(measured.lines),
    "max_duplicate_line_char_share": lambda measured: _repeated_chars(measured.lines),
    "max_duplicate_paragraph_share": lambda measured: _repeated(measured.paragraphs),
    "max_duplicate_paragraph_char_share": lambda measured: _repeated_chars(measured.paragraphs),
    "min_stop_words": _Measured.stop_words,
    "max_digit_share": _Measured.digit_share,
    "max_symbol_share": _Measured.symbol_share,
    "min_alphabetic_word_share": _Measured.alphabetic_word_share,
}
"""What the value of each rule is compared with, in the order in which rules are tried."""


def _repeated(parts: Sequence[str]) -> float:
    return _share(len(parts) - len(set(parts)), len(parts))


def _repeated_chars(parts: Sequence[str]) -> float:
    total = sum(map(len, parts))
    return _share(total - sum(map(len, set(parts))), total)


def _share(part: float, whole: int) -> float:
    """Part of the whole; an empty whole has none."""
    return part / whole if whole else 0.0


def _above(value: float, limit: float) -> bool:
    return value > limit
