"""Vocabularies of tiktoken: a file of ranks, a pattern that cuts text into words, and special tokens.

A rank file has a line a token: its bytes in base64, a space, its rank, which is its id. The file alone does not say
the pattern and the special tokens: those of the public encodings are known here by name. The library is asked whether
the converted tokenizer gives the same ids.
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, override

from tokenizers import Regex, decoders, pre_tokenizers

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.data.tokenizer.base import missing_end_of_document
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.errors import ConfigError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.tokenizers.common import Converted, Vocabulary, merges_of
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import read_file

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: dict[str, str] = dict.fromkeys(("gpt2", "r50k_base", "p50k_base", "p50k_edit"), _GPT2)
PATTERNS |= {"cl100k_base": _CL100K, "o200k_base": _O200K, "o200k_harmony": _O200K}
"""Patterns of the public encodings (tiktoken 0.14, `tiktoken_ext.openai_public`)."""
_FILL_IN = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
SPECIAL_TOKENS: dict[str, dict[str, int]] = {
    "gpt2": {"<|endoftext|>": 50256},
    "cl100k_base": {"<|endoftext|>": 100257} | _FILL_IN,
    "o200k_base": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
}
"""Special tokens of the encodings whose rank file may be named by a path."""

_AS_IT_IS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
# Bytes that a byte-level vocabulary does not spell as they are, and how it does.
_LETTERS = {byte: chr(256 + i) for i, byte in enumerate((*range(33), *range(127, 161), 173))}
_ATOM = r"(\\[pP]\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\\[\](){}|*+?])"
_POSSESSIVE = re.compile(_ATOM + r"(\{\d+(?:,\d*)?\})\+")


@dataclass(frozen=True, kw_only=True)
class Tiktoken(Vocabulary):
    """A vocabulary of tiktoken, which becomes a tokenizer.json.

    Attributes:
        path: of the rank file, or its URL; None lets the library look for the encoding itself, in its cache
            (`TIKTOKEN_CACHE_DIR`) or at its place on the network.
        encoding: the pattern and the special tokens: gpt2, cl100k_base or o200k_base, without a path any of `PATTERNS`.
        pattern: regular expression that cuts text into words, in place of that of the encoding.
        special_tokens: in place of those of the encoding; their ids follow the last rank, in this order.
    """

    names_end = True
    path: NonEmpty | None = None
    encoding: str = "cl100k_base"
    pattern: str | None = None
    special_tokens: tuple[str, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        complete = self.pattern is not None and self.special_tokens
        if self.path is not None and self.encoding not in SPECIAL_TOKENS and not complete:
            fix = "use encoding=cl100k_base, or give pattern and special_tokens"
            yield Problem(fields=("encoding",), message=f"is none of {', '.join(SPECIAL_TOKENS)}", fix=fix)
        if self.path is None and (self.pattern is not None or self.special_tokens):
            message = "an own pattern and own special tokens need a file of ranks"
            yield Problem(fields=("path",), message=message, fix="give the path of one")


def convert_tiktoken(config: Tiktoken) -> Converted:
    """Converts a vocabulary of tiktoken. Raises as `convert`."""
    library = import_optional("tiktoken", needed_by="tokenizer=tiktoken", install="jaxinfra[tiktoken]")
    name = config.path or config.encoding
    if config.path is None:
        pattern, ranks, special = _of_library(library, config.encoding)
    else:
        ranks = _parse(read_file(config.path, "a tokenizer"), config.path)
        pattern, special = config.pattern or PATTERNS[config.encoding], SPECIAL_TOKENS.get(config.encoding, {})
        if config.special_tokens:
            special = {text: max(ranks.values()) + 1 + i for i, text in enumerate(config.special_tokens)}
    if config.end_of_document not in special:
        raise missing_end_of_document(name, config.end_of_document, special)
    if taken := set(special.values()) & set(ranks.values()):
        raise ConfigError(
            f"{name}: id {min(taken)} is both a token of its file and a special one; the encoding fits another file"
        )
    try:
        original = library.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        content = _content(pattern, ranks, special)
    except Exception as error:  # both libraries raise bare classes
        raise ConfigError(f"{name}: tiktoken refuses it ({cause_of(error)}); check pattern and ranks") from None
    return Converted(
        tokenizer=JsonTokenizer.from_bytes(content, config.end_of_document, name),
        encode=original.encode_ordinary,
        decode=original.decode,
        name=name,
    )


def _content(pattern: str, ranks: Mapping[bytes, int], special: Mapping[str, int]) -> bytes:
    """Makes the tokenizer.json of ranks."""
    spelled = {token: token.decode("latin-1").translate(_LETTERS) for token in sorted(ranks, key=ranks.__getitem__)}
    merges = [[spelled[left], spelled[right]] for left, right in merges_of(ranks)]
    by_id = sorted(special.items(), key=lambda item: item[1])
    vocab = {text: ranks[token] for token, text in spelled.items()} | dict(by_id)
    cut = pre_tokenizers.Split(Regex(_POSSESSIVE.sub(r"(?>\1\2)", pattern)), behavior="isolated")
    words = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tree = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": text, "special": True} | _AS_IT_IS for text, index in by_id],
        "pre_tokenizer": json.loads(words.__getstate__()),
        "decoder": json.loads(decoders.ByteLevel().__getstate__()),
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
    return json.dumps(tree, ensure_ascii=False).encode()


def _parse(content: bytes, name: str) -> dict[bytes, int]:
    """Reads the ranks of a file, which must have a token for every byte."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            start = line[:40].decode(errors="replace")
            raise ConfigError(
                f"{name}: line {number} is {start!r}, expected a token in base64 and its rank; give a file of ranks"
            ) from None
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks):
        cause = f"no token for byte {missing[0]}" if missing else "two tokens of one rank"
        raise ConfigError(f"{name}: is not a whole file of ranks ({cause}); copy it anew")
    return ranks


def _of_library(library: Any, encoding: str) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Returns pattern, ranks and special tokens of an encoding that the library has."""
    if encoding not in PATTERNS:
        raise ConfigError(f"encoding={encoding}: its pattern is not known; use one of {', '.join(PATTERNS)}")
    try:
        found = library.get_encoding(encoding)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"encoding={encoding}: its file is not in tiktoken's cache and cannot be fetched "
            f"({cause_of(error)}); give the path of the rank file"
        ) from error
    ranks = {token: found.encode_single_token(token) for token in found.token_byte_values()}
    return PATTERNS[encoding], ranks, {text: found.encode_single_token(text) for text in found.special_tokens_set}
