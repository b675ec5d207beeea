"""Converts vocabularies of tiktoken to tokenizer.json: ranks, a pattern that splits text into words, special tokens.

A line of a rank file has the bytes of a token in base64, a space, and its rank, which is its id. The file does not have
the pattern and the special tokens, so this module lists them for the public encodings.
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import override

from tokenizers import Regex, decoders, pre_tokenizers

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.data.tokenizer.base import missing_end_of_document
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.errors import ConfigError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.tokenizers.common import ConvertedTokenizer, TokenizerConfig, derive_merges
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import read_file

# The patterns of the encodings, which split text into words.
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
"""Special tokens of the encodings that a rank file at a path can have."""

_EXACT_MATCH = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
# Characters that stand for unprintable bytes in a byte-level vocabulary.
_BYTE_CHARS = {byte: chr(256 + i) for i, byte in enumerate((*range(33), *range(127, 161), 173))}
# Oniguruma, which `tokenizers` uses, does not read `X{n,m}+` as possessive, so it becomes the group `(?>X{n,m})`. X is
# an escape, a character class or a character.
_ATOM = r"(\\[pP]\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\\[\](){}|*+?])"
_POSSESSIVE = re.compile(_ATOM + r"(\{\d+(?:,\d*)?\})\+")


@dataclass(frozen=True, kw_only=True)
class Tiktoken(TokenizerConfig):
    """A vocabulary of tiktoken.

    The encoding gives the pattern that splits text into words and the special tokens, unless those are set. Without a
    path, tiktoken finds the encoding in its cache (`TIKTOKEN_CACHE_DIR`) or on the network.

    Attributes:
        path: path or URL of the rank file.
        encoding: gpt2, cl100k_base or o200k_base; without a path any of `PATTERNS`.
        pattern: regular expression that matches words; None takes that of the encoding.
        special_tokens: special tokens, which get the ids after the last rank; () takes those of the encoding.
    """

    end_in_special_tokens = True
    path: NonEmptyStr | None = None
    encoding: str = "cl100k_base"
    pattern: str | None = None
    special_tokens: tuple[str, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        complete = self.pattern is not None and self.special_tokens
        if self.path is not None and self.encoding not in SPECIAL_TOKENS and not complete:
            fix = "use encoding=cl100k_base, or give pattern and special_tokens"
            yield Problem(fields=("encoding",), message=f"must be {', '.join(SPECIAL_TOKENS)}", fix=fix)
        if self.path is None and (self.pattern is not None or self.special_tokens):
            message = "pattern and special_tokens need a rank file"
            yield Problem(fields=("path",), message=message, fix="use path=PATH")


def convert_tiktoken(config: Tiktoken) -> ConvertedTokenizer:
    """Converts a vocabulary of tiktoken; raises as `convert_tokenizer`."""
    library = import_optional("tiktoken", needed_by="tokenizer=tiktoken", install="jaxinfra[tiktoken]")
    name = config.path or config.encoding
    if config.path is None:
        pattern, ranks, special = _load_encoding(library, config.encoding)
    else:
        ranks = _parse_ranks(read_file(config.path, "a tokenizer"), config.path)
        pattern, special = config.pattern or PATTERNS[config.encoding], SPECIAL_TOKENS.get(config.encoding, {})
        if config.special_tokens:
            special = {text: index for index, text in enumerate(config.special_tokens, max(ranks.values()) + 1)}
    if config.end_of_document not in special:
        raise missing_end_of_document(name, config.end_of_document, special)
    if taken := set(special.values()) & set(ranks.values()):
        cause = f"id {min(taken)} is both in the rank file and a special token"
        raise ConfigError(f"{name}: {cause}; use the encoding of this file")
    try:
        original = library.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        content = _to_json(pattern, ranks, special)
    except Exception as error:  # neither library has an error class of its own
        raise ConfigError(f"{name}: tiktoken refuses it ({cause_of(error)}); check pattern and ranks") from None
    return ConvertedTokenizer(
        tokenizer=JsonTokenizer.from_bytes(content, config.end_of_document, name),
        encode=original.encode_ordinary,
        decode=original.decode,
        name=name,
    )


def _to_json(pattern: str, ranks: Mapping[bytes, int], special: Mapping[str, int]) -> bytes:
    """Returns the content of a tokenizer.json, whose byte-level vocabulary stores each byte as one character."""
    text_of = {token: token.decode("latin-1").translate(_BYTE_CHARS) for token in sorted(ranks, key=ranks.__getitem__)}
    merges = [[text_of[left], text_of[right]] for left, right in derive_merges(ranks)]
    by_id = sorted(special.items(), key=lambda item: item[1])
    vocab = {text: ranks[token] for token, text in text_of.items()} | dict(by_id)
    split = pre_tokenizers.Split(Regex(_POSSESSIVE.sub(r"(?>\1\2)", pattern)), behavior="isolated")
    words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tree = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": text, "special": True} | _EXACT_MATCH for text, index in by_id],
        "pre_tokenizer": json.loads(words.__getstate__()),
        "decoder": json.loads(decoders.ByteLevel().__getstate__()),
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
    return json.dumps(tree, ensure_ascii=False).encode()


def _parse_ranks(content: bytes, name: str) -> dict[bytes, int]:
    """Parses a rank file, which must have a token for every byte."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            start = line[:40].decode(errors="replace")
            raise ConfigError(
                f"{name}: line {number} is {start!r}, expected a token in base64 and its rank; use a file of ranks"
            ) from None
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks):
        cause = f"no token for byte {missing[0]}" if missing else "two tokens have one rank"
        raise ConfigError(f"{name}: is not a complete file of ranks ({cause}); copy it again")
    return ranks


def _load_encoding(library: ModuleType, encoding: str) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Returns pattern, ranks and special tokens of a public encoding."""
    if encoding not in PATTERNS:
        raise ConfigError(f"encoding={encoding}: is not a known encoding; use one of {', '.join(PATTERNS)}")
    try:
        loaded = library.get_encoding(encoding)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"encoding={encoding}: its file is not in tiktoken's cache and cannot be downloaded "
            f"({cause_of(error)}); use path=PATH of the rank file"
        ) from error
    ranks = {token: loaded.encode_single_token(token) for token in loaded.token_byte_values()}
    return PATTERNS[encoding], ranks, {text: loaded.encode_single_token(text) for text in loaded.special_tokens_set}
