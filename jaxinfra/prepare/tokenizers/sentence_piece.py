"""Vocabularies of SentencePiece (Kudo and Richardson 2018): a `.model` file.

Pieces of type *control* are never found in a text. Those that a model calls *user defined* are, be they markers of
turns or HTML tags: which of them only a template may spell is decided when the file is converted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfra.config.limits import NonEmpty
from jaxinfra.data.tokenizer.base import missing_end_of_document
from jaxinfra.data.tokenizer.tokenizer_json import JsonTokenizer
from jaxinfra.errors import ConfigError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.tokenizers.common import Converted, Vocabulary, merges_of
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import read_file

_SPACE = "\u2581"
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_PRIVATE = 0xF0000  # characters that are assigned to nothing
_APART = "\U0010fffc"
_NEVER = -1e5  # a score so low that unigrams never choose the piece


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel(Vocabulary):
    """A model of SentencePiece, of the path or URL of a `.model`, which becomes a tokenizer.json.

    `special_tokens` are user-defined pieces that only a template may spell; None is all that look like `<...>` or
    `[...]`. Control pieces and the end of a document always are.
    """

    names_end = True
    path: NonEmpty = ""
    special_tokens: tuple[str, ...] | None = None
    end_of_document: NonEmpty = "</s>"


def convert_sentence_piece(config: SentencePieceModel) -> Converted:
    """Converts a model of SentencePiece. Raises as `convert`."""
    by, install = "tokenizer=sentence_piece_model", "jaxinfra[sentencepiece]"
    library = import_optional("sentencepiece", "sentencepiece_model_pb2", needed_by=by, install=install)
    from google.protobuf.message import DecodeError

    try:
        model = library.sentencepiece_model_pb2.ModelProto.FromString(read_file(config.path, "a tokenizer"))
        if not model.pieces:
            raise DecodeError("it has no pieces")
    except DecodeError as error:
        cause = f"is not a model of SentencePiece ({cause_of(error)})"
        raise ConfigError(f"{config.path}: {cause}; give its .model") from None
    _make_control(model, config)
    if model.trainer_spec.model_type == model.trainer_spec.WORD:
        raise ConfigError(f"{config.path}: is a model of whole words; give one of unigrams, BPE or characters")
    processor = library.SentencePieceProcessor(model_proto=model.SerializeToString())
    unigrams = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    return Converted(
        tokenizer=JsonTokenizer.from_backend(_backend(model), config.end_of_document, config.path),
        encode=processor.encode,
        decode=processor.decode,
        unknown=processor.unk_id(),
        scores=np.array([piece.score for piece in model.pieces]) if unigrams else None,
        name=config.path,
    )


def _make_control(model: Any, config: SentencePieceModel) -> None:
    """Makes control pieces of the user-defined ones that no text may spell."""
    types = model.SentencePiece
    may_be = {piece.piece: piece for piece in model.pieces if piece.type in (types.CONTROL, types.USER_DEFINED)}
    found = [text for text, piece in may_be.items() if piece.type == types.CONTROL or _MARKER.fullmatch(text)]
    special = config.special_tokens
    if special is None:
        special = [text for text in found if may_be[text].type == types.USER_DEFINED]
    for text in (*special, config.end_of_document):
        if text in may_be:
            may_be[text].type = types.CONTROL
        elif text == config.end_of_document:
            raise missing_end_of_document(config.path, text, found)
        else:
            raise ConfigError(f"special_tokens: {config.path} has no special piece {text}; it has {', '.join(found)}")


def _backend(model: Any) -> Backend:
    """Makes a tokenizer of the library `tokenizers` that does what a model says, with its own normalization."""
    types, spec = model.SentencePiece, model.normalizer_spec
    special = [piece.piece for piece in model.pieces if piece.type in (types.CONTROL, types.UNKNOWN)]
    defined = [piece.piece for piece in model.pieces if piece.type == types.USER_DEFINED]
    steps = _characters(spec.precompiled_charsmap, defined) if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if spec.add_dummy_prefix else []
    steps += [normalizers.Replace(" ", _SPACE)] if spec.escape_whitespaces else []
    cuts: list[Any] = [pre_tokenizers.Metaspace(prepend_scheme="first", split=False)] if spec.add_dummy_prefix else []
    if defined:
        spelled = "|".join(map(re.escape, sorted(defined, key=len, reverse=True)))
        cuts.append(pre_tokenizers.Split(Regex(spelled), behavior="isolated"))
    letters = {piece.piece for piece in model.pieces if piece.type == types.NORMAL}
    unigrams = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    if model.trainer_spec.byte_fallback and (not letters.issuperset("<0x123456789ABCDEF>") if unigrams else defined):
        byte = "<(?=0x[0-9A-F]{2}>)" if unigrams else r"\A<(?=0x[0-9A-F]{2}>\z)"  # else a text spells tokens of bytes
        cuts.append(pre_tokenizers.Split(Regex(byte), behavior="merged_with_previous"))
    ends = [decoders.ByteFallback(), decoders.Replace(_SPACE, " "), decoders.Fuse()]
    ends += [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend = Backend(_model(model))
    backend.normalizer = normalizers.Sequence(steps)
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.Sequence(ends)
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return backend


def _characters(charsmap: bytes, defined: Sequence[str]) -> list[Any]:
    """Normalizes characters, but not those of user-defined pieces: they are other characters meanwhile.

    `Precompiled` drops the marks of a letter that it changes, so they are held apart from it once they are composed.
    """
    change = normalizers.Precompiled(charsmap)
    kept = [text for text in sorted(defined, key=len, reverse=True) if change.normalize_str(text) != text]
    away = [normalizers.Replace(text, chr(_PRIVATE + number)) for number, text in enumerate(kept)]
    back = [normalizers.Replace(chr(_PRIVATE + number), text) for number, text in enumerate(kept)]
    apart, together = normalizers.Replace(Regex(r"(?=\p{M})"), _APART), normalizers.Replace(_APART, "")
    return [*away, normalizers.NFC(), apart, change, together, normalizers.NFC(), *back]


def _model(model: Any) -> models.Model:
    types, trainer = model.SentencePiece, model.trainer_spec
    texts = [f"\U0010ffff{i}" if piece.type == types.UNUSED else piece.piece for i, piece in enumerate(model.pieces)]
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == types.UNKNOWN)
    if trainer.model_type == trainer.UNIGRAM:
        found = (types.NORMAL, types.USER_DEFINED)
        scores = [piece.score if piece.type in found else _NEVER for piece in model.pieces]
        return models.Unigram(list(zip(texts, scores, strict=True)), unknown, trainer.byte_fallback)
    ranks = {piece.piece: (-piece.score, i) for i, piece in enumerate(model.pieces) if piece.type == types.NORMAL}
    return models.BPE(
        vocab={text: i for i, text in enumerate(texts)},
        merges=[] if trainer.model_type == trainer.CHAR else merges_of(ranks),
        unk_token=texts[unknown],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=any(piece.type == types.USER_DEFINED for piece in model.pieces),
    )
