"""Small real vocabularies of every kind, written as the files that their libraries read."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.prepare.tokenizers import (
    Bytes,
    PretrainedTokenizer,
    SentencePieceModel,
    Tiktoken,
    TokenizerFile,
    convert_tokenizer,
    train_bpe,
)

EOT = "<|endoftext|>"
TEXTS = ["def naïve(x):\n\treturn  'é漢字 🙂'\n" * 5, "class A:\n    pass\n" * 20, "\r\n  \x00 tail"]
MARKERS = ("<|im_start|>", "<|im_end|>")
KINDS = ("bpe", "unigram", "fallback", "tiktoken", "sentencepiece", "bytes")
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]


def build_tokenizer(config: PretrainedTokenizer) -> Tokenizer:
    """The tokenizer of a config that needs no training."""
    return convert_tokenizer(config)[0]


def vocabulary(kind: str, folder: Path) -> Tokenizer:
    """A tokenizer of the kind; its file is written into the folder."""
    return {
        "bpe": _bpe,
        "unigram": _unigram,
        "fallback": _fallback,
        "tiktoken": _tiktoken,
        "sentencepiece": _sentencepiece,
        "bytes": lambda _: build_tokenizer(Bytes(end_of_document=EOT, special_tokens=MARKERS)),
    }[kind](folder)


def _bpe(folder: Path) -> Tokenizer:
    backend = Backend.from_buffer(train_bpe(TEXTS, vocab_size=290, end_of_document=EOT).content)
    backend.add_special_tokens(list(MARKERS))
    return _from_json(backend, folder / "bpe.json")


def _unigram(folder: Path) -> Tokenizer:
    """As in T5: the model itself has its special tokens as the likeliest pieces."""
    spelt = "".join((*TEXTS, EOT, *MARKERS))
    letters = sorted(set(spelt + spelt.upper() + "▁b"))
    special = ["<unk>", EOT, *MARKERS]
    pieces = [(text, 0.0) for text in special] + [(letter, -3.0) for letter in letters] + [("▁class", -2.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens(special)
    return _from_json(backend, folder / "unigram.json")


def _fallback(folder: Path) -> Tokenizer:
    """As in Gemma: spaces are spelt with another character, and what is not in the vocabulary falls back to bytes."""
    words = ["<unk>", *BYTE_PIECES, "▁", "a", "s", "l", "c", "as", "la", "las", "▁▁"]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [("a", "s"), ("l", "as"), ("▁", "▁")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (EOT, *MARKERS)])
    return _from_json(backend, folder / "fallback.json")


def _from_json(backend: Backend, path: Path) -> Tokenizer:
    backend.save(str(path))
    return build_tokenizer(TokenizerFile(path=str(path), end_of_document=EOT))


def rank_file(path: Path) -> Path:
    """A file of ranks: the bytes and some pairs of them."""
    tokens = [bytes([value]) for value in range(256)] + [b"  ", b"as", b"cl", b"\n\n", "é".encode(), b"class"]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def _tiktoken(folder: Path) -> Tokenizer:
    path = rank_file(folder / "small.tiktoken")
    return build_tokenizer(Tiktoken(path=str(path), special_tokens=(EOT, *MARKERS), end_of_document=EOT))


def spm_file(path: Path, texts: Sequence[str] | None = None, **fields: object) -> Path:
    """A model of SentencePiece; without fields one that leaves texts as they are, with markers as user defined."""
    import sentencepiece  # inside: every test process loads this file, also one with the base dependencies alone

    model = io.BytesIO()
    plain = {"model_type": "bpe", "vocab_size": 340, "hard_vocab_limit": False, "byte_fallback": True}
    plain |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    plain |= {"control_symbols": [EOT], "user_defined_symbols": [*MARKERS, "\n\n"]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts or TEXTS * 10), model_writer=model, minloglevel=2, **(fields or plain)
    )
    path.write_bytes(model.getvalue())
    return path


def _sentencepiece(folder: Path) -> Tokenizer:
    return build_tokenizer(SentencePieceModel(path=str(spm_file(folder / "small.model")), end_of_document=EOT))


def control(tokenizer, text):
    """Token ids of the text of a template: special tokens that are spelt in it become those tokens."""
    ids = []
    for part in tokenizer.split(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part, continuation=bool(ids))
    return ids
