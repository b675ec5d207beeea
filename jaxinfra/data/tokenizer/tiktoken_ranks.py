"""Vocabularies of tiktoken: a file of ranks, a pattern that cuts text into words, and special tokens.

A rank file has a line a token: its bytes in base64, a space, its rank, which is its id. The file alone does not say
the pattern and the special tokens: those of the public encodings are known here by name.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.data.tokenizer.base import Tokenizer, common_problems, no_end, threads
from jaxinfra.errors import ConfigError
from jaxinfra.packages import needed
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import read_content

LONGEST_GAP = 100_000
"""Characters of white space in one piece beyond which the library's patterns overflow its stack (from 300,000 on)."""
_GAP = re.compile(r"\s{1000,}")

_WORDS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_WORDS_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORDS_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FILL_IN = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}

ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (_WORDS_GPT2, {"<|endoftext|>": 50256}),
    "cl100k_base": (_WORDS_CL100K, {"<|endoftext|>": 100257} | _FILL_IN),
    "o200k_base": (_WORDS_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
"""Pattern and special tokens of the public encodings (tiktoken 0.14, `tiktoken_ext.openai_public`)."""


@dataclass(frozen=True, kw_only=True)
class Tiktoken:
    """A vocabulary of tiktoken.

    Attributes:
        path: of the rank file, or its URL; None lets the library look for the encoding itself, in its cache
            (`TIKTOKEN_CACHE_DIR`) or at its place on the network.
        encoding: name of the pattern and the special tokens: gpt2, cl100k_base or o200k_base; without a path any
            that the library knows.
        pattern: regular expression that cuts text into words, in place of that of the encoding.
        special_tokens: in place of those of the encoding; their ids follow the last rank, in this order.
        end_of_document: the special token that closes every document.
    """

    path: str | None = None
    encoding: str = "cl100k_base"
    pattern: str | None = None
    special_tokens: tuple[str, ...] = ()
    end_of_document: str = "<|endoftext|>"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description."""
        others = [text for text in self.special_tokens if text != self.end_of_document]
        yield from common_problems(path=self.path, end_of_document=self.end_of_document, special_tokens=others)
        complete = self.pattern is not None and self.special_tokens
        if self.path is not None and self.encoding not in ENCODINGS and not complete:
            yield Problem(
                fields=("encoding",),
                message=f"is none of {', '.join(ENCODINGS)}",
                fix="use encoding=cl100k_base, or give pattern and special_tokens",
            )
        if self.path is None and (self.pattern is not None or self.special_tokens):
            yield Problem(
                fields=("path",),
                message="an own pattern and own special tokens need a file of ranks",
                fix="give the path of one",
            )


def load_tiktoken(config: Tiktoken) -> "TiktokenTokenizer":
    """Reads a vocabulary of tiktoken.

    Raises:
        ConfigError: its file cannot be read or is damaged, it lacks the end of a document, or tiktoken is missing.
    """
    if config.path is None:
        found = _named(config.encoding)
        parts = found._pat_str, found._special_tokens, found._mergeable_ranks
    else:
        ranks = _parse(read_content(config.path, "a tokenizer"), config.path)
        pattern, special = ENCODINGS.get(config.encoding, ("", {}))
        if config.special_tokens:
            special = {text: max(ranks.values()) + 1 + i for i, text in enumerate(config.special_tokens)}
        parts = config.pattern or pattern, special, ranks
    name = config.path or config.encoding
    return TiktokenTokenizer.restore(_content(*parts), config.end_of_document, name)


class TiktokenTokenizer(Tokenizer):
    """A vocabulary of the library tiktoken."""

    kind = "tiktoken"
    file_name = "tiktoken.json"

    def __init__(self, content: bytes, encoding: Any, special: dict[str, int], end_of_document: str):
        """Takes the library's `Encoding`, of which `content` is the file."""
        self.content = content
        self.end_of_document = end_of_document
        self.eot_id = special[end_of_document]
        self.special = special
        self.vocab_size = encoding.max_token_value + 1
        self._encoding = encoding
        self._bytes: dict[int, bytes] = {rank: token for token, rank in encoding._mergeable_ranks.items()}

    @classmethod
    def restore(cls, content: bytes, end_of_document: str, name: str) -> Self:
        """See `Tokenizer`."""
        library = _library()
        try:
            tree = json.loads(content)
            pattern, special, lines = tree["pattern"], tree["special_tokens"], tree["ranks"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{name}: is not a tiktoken.json ({cause_of(error)}); copy it anew") from None
        ranks = _parse(lines.encode(), name)
        if end_of_document not in special:
            raise no_end(name, end_of_document, special)
        taken = set(ranks.values()) & set(special.values())
        if taken:
            raise ConfigError(
                f"{name}: id {min(taken)} is both a token of its file and a special one; the encoding fits another file"
            )
        try:
            encoding = library.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{name}: tiktoken refuses it ({cause_of(error)}); check pattern and ranks") from None
        return cls(content, encoding, special, end_of_document)

    def encode_batch(self, texts: Sequence[str], *, inner: bool = False) -> list[list[int]]:
        """See `Tokenizer`; runs on `threads` and releases the GIL."""
        if len(texts) == 1 or any(len(text) > LONGEST_GAP for text in texts):
            return [self._encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads())

    def _encode(self, text: str) -> list[int]:
        if len(text) <= LONGEST_GAP:
            return self._encoding.encode_ordinary(text)
        return [index for part in _parts(text) for index in self._encoding.encode_ordinary(part)]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return b"".join(self._bytes.get(index, b"") for index in ids).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """See `Tokenizer`."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for index, token in self._bytes.items():
            lengths[index] = len(token)
        return lengths


def _content(pattern: str, special: dict[str, int], ranks: dict[bytes, int]) -> bytes:
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    lines = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in by_rank)
    special = dict(sorted(special.items(), key=lambda item: item[1]))
    return json.dumps({"pattern": pattern, "special_tokens": special, "ranks": lines}, indent=1).encode()


def _parse(content: bytes, name: str) -> dict[bytes, int]:
    """The ranks of a file, which must have a token for every byte."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            start = line[:40].decode(errors="replace")
            raise ConfigError(
                f"{name}: line {number} is {start!r}, expected a token in base64 and its rank; give a file of ranks"
            ) from None
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks):
        cause = f"no token for byte {missing[0]}" if missing else "two tokens of one rank"
        raise ConfigError(f"{name}: is not a whole file of ranks ({cause}); copy it anew")
    return ranks


def _parts(text: str) -> Iterator[str]:
    """Yields the text, cut inside of gaps that are too long for the library."""
    start = 0
    for gap in _GAP.finditer(text):
        for cut in range(gap.start() + LONGEST_GAP, gap.end(), LONGEST_GAP):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _library() -> Any:
    return needed("tiktoken", by="tokenizer=tiktoken", install="jaxinfra[tiktoken]")


def _named(encoding: str) -> Any:
    library = _library()
    if encoding not in library.list_encoding_names():
        known = ", ".join(library.list_encoding_names())
        raise ConfigError(f"encoding={encoding}: tiktoken knows no such encoding; use one of {known}")
    try:
        return library.get_encoding(encoding)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"encoding={encoding}: its file is not in tiktoken's cache and cannot be fetched "
            f"({cause_of(error)}); give the path of the rank file"
        ) from error
