"""What tokenizers of recipes share: problems of their descriptions, and the proof that a converted one is the same."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.errors import ConfigError

TRICKY = (
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
"""Texts on which libraries disagree first: white space, scripts, normalization, spelled bytes and special tokens."""

_PRECISION = 1e-6  # of sums in float32


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer, as a config describes it; `end_of_document` is the special token that closes every document."""

    names_end: ClassVar[bool] = False
    """Whether its special tokens may name the end of a document too."""
    end_of_document: NonEmpty = "<|endoftext|>"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description; its file is not looked at."""
        named = getattr(self, "special_tokens", None) or ()
        special = [text for text in named if not self.names_end or text != self.end_of_document]
        if "" in special or len({self.end_of_document, *special}) <= len(special):
            message = "must be other texts than one another and than the end of a document, and not empty"
            yield Problem(fields=("special_tokens",), message=message, fix="name each once")


def merges_of[Token: (str, bytes)](ranks: Mapping[Token, Any]) -> list[tuple[Token, Token]]:
    """Returns all pairs of tokens that make a token, by its rank: libraries that merge the least union take any."""
    return [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A tokenizer that was made of a file, and how the library that the file is of encodes and decodes.

    Attributes:
        unknown: the id of what the vocabulary has no token for; the libraries spell it differently.
        scores: of the pieces of a unigram model, which may cut a text in several ways that are equally likely; which
            of them is taken hangs on rounding.
    """

    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    unknown: int | None = None
    scores: np.ndarray | None = None
    name: str

    def check(self, texts: Iterable[str]) -> None:
        """Compares ids and decoded text with those of the original library; a ConfigError says where they differ."""
        for text in texts:
            for each in (text, *(f"a{token}b{token} c" for token in self.tokenizer.special_tokens if token in text)):
                if cause := self._difference(each):
                    raise ConfigError(
                        f"{self.name}: does not round-trip as a tokenizer.json: {cause}; give the tokenizer.json of "
                        "this vocabulary with tokenizer=tokenizer_file"
                    )

    def _difference(self, text: str) -> str | None:
        expected, found = self.encode(text), self.tokenizer.encode(text)
        if expected != found and not self._equally_likely(expected, found):
            at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
            where = text[max(0, len(self.decode(expected[:at])) - 10) :][:40]
            ours, theirs = (", ".join(map(str, ids[at : at + 4])) or "none" for ids in (found, expected))
            return f"near {where!r} it gives the ids {ours}, expected {theirs}"
        if self.unknown not in expected and self.decode(expected) != (back := self.tokenizer.decode(found)):
            return f"the text {text[:40]!r} comes back as {back[:40]!r}"
        return None

    def _equally_likely(self, expected: list[int], found: list[int]) -> bool:
        """Tells whether two ways to cut a text are equally likely, to the precision of sums in float32."""
        if self.scores is None or expected.count(self.unknown or 0) != found.count(self.unknown or 0):
            return False
        return bool(np.isclose(self.scores[expected].sum(), self.scores[found].sum(), rtol=_PRECISION))
