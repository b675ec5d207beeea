"""Converts `.model` files of SentencePiece (Kudo and Richardson 2018) to tokenizer.json.

SentencePiece never finds *control* pieces in a text, but does find *user-defined* pieces, which may be turn markers or
HTML tags. The conversion decides which of them become special tokens, which only a template may write.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.data.tokenizer.base import missing_end_of_document
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.errors import ConfigError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.tokenizers.common import ConvertedTokenizer, TokenizerConfig, derive_merges
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import read_file

_SPACE = "\u2581"  # stands for a space in pieces
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # <...> or [...]
_PRIVATE_USE = 0xF0000  # first of the characters that stand for user-defined pieces
_SEPARATOR = "\U0010fffc"  # a character that no text has
_NEVER = -1e5  # a score so low that a unigram model never chooses the piece


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel(TokenizerConfig):
    """A `.model` file of SentencePiece.

    Attributes:
        path: path or URL of the file.
        special_tokens: the user-defined pieces that become special; None is all that look like `<...>` or `[...]`.
            Control pieces and the end of a document are always special.
    """

    end_in_special_tokens = True
    path: NonEmptyStr = ""
    special_tokens: tuple[str, ...] | None = None
    end_of_document: NonEmptyStr = "</s>"


def convert_sentence_piece(config: SentencePieceModel) -> ConvertedTokenizer:
    """Converts a model of SentencePiece; raises as `convert_tokenizer`."""
    by, install = "tokenizer=sentence_piece_model", "jaxinfra[sentencepiece]"
    library = import_optional("sentencepiece", "sentencepiece_model_pb2", needed_by=by, install=install)
    from google.protobuf.message import DecodeError

    try:
        model = library.sentencepiece_model_pb2.ModelProto.FromString(read_file(config.path, "a tokenizer"))
        if not model.pieces:
            raise DecodeError("it has no pieces")
    except DecodeError as error:
        cause = f"is not a model of SentencePiece ({cause_of(error)})"
        raise ConfigError(f"{config.path}: {cause}; use a .model file") from None
    _mark_control_pieces(model, config)
    spec = model.trainer_spec
    if spec.model_type == spec.WORD:
        raise ConfigError(f"{config.path}: is a model of whole words; use one of unigrams, BPE or characters")
    processor = library.SentencePieceProcessor(model_proto=model.SerializeToString())
    is_unigram = spec.model_type == spec.UNIGRAM
    return ConvertedTokenizer(
        tokenizer=JsonTokenizer.from_backend(_to_backend(model), config.end_of_document, config.path),
        encode=processor.encode,
        decode=processor.decode,
        unknown=processor.unk_id(),
        scores=np.array([piece.score for piece in model.pieces]) if is_unigram else None,
        name=config.path,
    )


def _mark_control_pieces(model: Any, config: SentencePieceModel) -> None:
    """Turns the user-defined pieces that become special tokens into control pieces."""
    types = model.SentencePiece  # holds the constants of piece types
    by_text = {piece.piece: piece for piece in model.pieces if piece.type in (types.CONTROL, types.USER_DEFINED)}
    special_like = [text for text, piece in by_text.items() if piece.type == types.CONTROL or _MARKER.fullmatch(text)]
    special = config.special_tokens
    if special is None:
        special = [text for text in special_like if by_text[text].type == types.USER_DEFINED]
    for text in (*special, config.end_of_document):
        if text in by_text:
            by_text[text].type = types.CONTROL
        elif text == config.end_of_document:
            raise missing_end_of_document(config.path, text, special_like)
        else:
            fix = f"use some of {', '.join(special_like)}"
            raise ConfigError(f"special_tokens: {config.path} has no special piece {text}; {fix}")


def _to_backend(model: Any) -> Backend:
    """Makes a tokenizer of the library `tokenizers` from the model, including its normalization."""
    types, spec, trainer = model.SentencePiece, model.normalizer_spec, model.trainer_spec
    special = [piece.piece for piece in model.pieces if piece.type in (types.CONTROL, types.UNKNOWN)]
    user_defined = [piece.piece for piece in model.pieces if piece.type == types.USER_DEFINED]
    steps = _normalize_characters(spec.precompiled_charsmap, user_defined) if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    splits: list[pre_tokenizers.PreTokenizer] = []
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
        splits.append(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if user_defined:
        pattern = "|".join(map(re.escape, sorted(user_defined, key=len, reverse=True)))
        splits.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if trainer.byte_fallback:
        # The text "<0x41>" must not become the token of byte 0x41, so it is split after "<" where that could happen.
        byte_text = None
        if trainer.model_type != trainer.UNIGRAM and user_defined:  # `ignore_merges` then looks up whole words
            byte_text = r"\A<(?=0x[0-9A-F]{2}>\z)"
        normal = {piece.piece for piece in model.pieces if piece.type == types.NORMAL}
        if trainer.model_type == trainer.UNIGRAM and not normal.issuperset("<0x123456789ABCDEF>"):
            byte_text = "<(?=0x[0-9A-F]{2}>)"  # characters without a piece leave the model no other choice
        if byte_text is not None:
            splits.append(pre_tokenizers.Split(Regex(byte_text), behavior="merged_with_previous"))
    decoding = [decoders.ByteFallback(), decoders.Replace(_SPACE, " "), decoders.Fuse()]
    decoding += [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend = Backend(_to_model(model))
    backend.normalizer = normalizers.Sequence(steps)
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.Sequence(decoding)
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return backend


def _normalize_characters(charsmap: bytes, user_defined: Sequence[str]) -> list[normalizers.Normalizer]:
    """Returns steps that normalize characters, except in user-defined pieces.

    These pieces are replaced by private-use characters meanwhile. `Precompiled` drops the combining marks of a letter
    that it changes, so a separator is put before each mark that NFC did not compose.
    """
    change = normalizers.Precompiled(charsmap)
    kept = [text for text in sorted(user_defined, key=len, reverse=True) if change.normalize_str(text) != text]
    hide = [normalizers.Replace(text, chr(_PRIVATE_USE + number)) for number, text in enumerate(kept)]
    restore = [normalizers.Replace(chr(_PRIVATE_USE + number), text) for number, text in enumerate(kept)]
    separate = normalizers.Replace(Regex(r"(?=\p{M})"), _SEPARATOR)
    join = normalizers.Replace(_SEPARATOR, "")
    return [*hide, normalizers.NFC(), separate, change, join, normalizers.NFC(), *restore]


def _to_model(model: Any) -> models.Model:
    """Makes the model of the backend: pieces with scores for unigrams, merges for BPE."""
    types, trainer = model.SentencePiece, model.trainer_spec
    # Unused pieces keep their ids, and get texts that no input has.
    texts = [f"\U0010ffff{i}" if piece.type == types.UNUSED else piece.piece for i, piece in enumerate(model.pieces)]
    unknown = [piece.type for piece in model.pieces].index(types.UNKNOWN)
    if trainer.model_type == trainer.UNIGRAM:
        usable = (types.NORMAL, types.USER_DEFINED)
        scores = [piece.score if piece.type in usable else _NEVER for piece in model.pieces]
        return models.Unigram(list(zip(texts, scores, strict=True)), unknown, trainer.byte_fallback)
    # SentencePiece merges the pair with the best score first, and among equal scores the one with the lower id.
    ranks = {piece.piece: (-piece.score, i) for i, piece in enumerate(model.pieces) if piece.type == types.NORMAL}
    return models.BPE(
        vocab={text: i for i, text in enumerate(texts)},
        merges=[] if trainer.model_type == trainer.CHAR else derive_merges(ranks),
        unk_token=texts[unknown],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=any(piece.type == types.USER_DEFINED for piece in model.pieces),
    )
