"""Common parts of tokenizer configs, and the comparison of a converted tokenizer with its original library."""

import os.path
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.errors import ConfigError

HARD_TEXTS = (
    "We've 12345 things'll\n\n  to DO, naïve 漢字 e\u0301 — iPhone's   \r\n\t!!/\n//x ",
    " a  b   c    d\t\te\n\n\nf \r\n g\u00a0h\u2028i\u3000j",
    "  \n ",
    "def f(x):\n\treturn {'é': [x**2, 3.14159e-10, 0xFF]}  # ok?\n" + " " * 300 + "x" + "\n" * 40,
    "ﬁ ﬀ Å Ａ ½ ① ｶﾞ İ ẞ 한국어 ру́сский العربية हिन्दी ไทย \U0001f9d1\u200d\U0001f680 \U0001f1e9\U0001f1ea",
    "\x00\x01\x7f\x80\ufffd\ufeff\U0010fffd",
    "a<0x41>b</s><s><unk><pad>[INST]<|endoftext|>{{x}}",
    "supercalifragilistic" * 9 + "a" * 500,
    "",
)
"""Texts on which libraries are likely to differ: white space, scripts, normalization, "<0x41>", special tokens."""

_PRECISION = 1e-6  # relative, of sums in float32


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Config of a tokenizer.

    Attributes:
        end_of_document: the special token that ends every document.
    """

    end_in_special_tokens: ClassVar[bool] = False
    """Whether `special_tokens` may contain `end_of_document`."""
    end_of_document: NonEmptyStr = "<|endoftext|>"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the fields; does not read the file."""
        special: list[str] = list(getattr(self, "special_tokens", None) or ())
        if self.end_in_special_tokens and self.end_of_document in special:
            special.remove(self.end_of_document)
        if "" in special or len({self.end_of_document, *special}) < 1 + len(special):
            message = "must not be empty, repeat each other, or repeat end_of_document"
            yield Problem(fields=("special_tokens",), message=message, fix="name each once")


def derive_merges[Token: (str, bytes)](ranks: Mapping[Token, Any]) -> list[tuple[Token, Token]]:
    """Returns the merges of a BPE: all pairs of tokens whose concatenation is a token, sorted by its rank.

    The original libraries store no merges. They merge the pair whose concatenation has the lowest rank. For example,
    the ranks {"a": 0, "b": 1, "ab": 2} give [("a", "b")].
    """
    return [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


@dataclass(frozen=True, kw_only=True)
class ConvertedTokenizer:
    """A tokenizer that was converted from another library's file."""

    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]  # of the original library
    decode: Callable[[list[int]], str]  # of the original library
    unknown: int | None = None  # id of unknown text, which the libraries decode differently
    scores: np.ndarray | None = None  # log-probabilities of the pieces of a unigram model
    name: str  # for messages

    def check(self, texts: Iterable[str]) -> None:
        """Compares ids and decoded text with the original library; ConfigError says where they differ."""
        for text in texts:
            # Special tokens in a text must stay ordinary text, also within and between words.
            contained = [token for token in self.tokenizer.special_tokens if token in text]
            for checked in (text, *(f"a{token}b{token} c" for token in contained)):
                if cause := self._difference(checked):
                    raise ConfigError(
                        f"{self.name}: does not round-trip as a tokenizer.json: {cause}; use the tokenizer.json of "
                        "this vocabulary with tokenizer=tokenizer_file"
                    )

    def _difference(self, text: str) -> str | None:
        """Returns how the conversion differs from the original library on a text; None if it does not."""
        expected, ours = self.encode(text), self.tokenizer.encode(text)
        if expected != ours and not self._equally_likely(expected, ours):
            num_equal = len(os.path.commonprefix([expected, ours]))
            place = text[max(0, len(self.decode(expected[:num_equal])) - 10) :][:40]
            actual, wanted = (", ".join(map(str, ids[num_equal:][:4])) or "none" for ids in (ours, expected))
            return f"near {place!r} it gives the ids {actual}, expected {wanted}"
        decoded = self.tokenizer.decode(ours)
        if self.unknown not in expected and self.decode(expected) != decoded:
            return f"the text {text[:40]!r} is decoded as {decoded[:40]!r}"
        return None

    def _equally_likely(self, expected: list[int], ours: list[int]) -> bool:
        """Returns whether a unigram model gives both segmentations the same score, so that rounding decides."""
        if self.scores is None or expected.count(self.unknown or 0) != ours.count(self.unknown or 0):
            return False
        return bool(np.isclose(self.scores[expected].sum(), self.scores[ours].sum(), rtol=_PRECISION))
