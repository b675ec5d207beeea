import json
import pickle
import random

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from jaxinfra.data.tokenizer import JsonTokenizer, StreamDecoder, load_tokenizer
from jaxinfra.errors import ConfigError
from tests.refusals import raises
from tests.vocabularies import EOT, KINDS, MARKERS, TEXTS, control, vocabulary

LOSSLESS = [kind for kind in KINDS if kind != "unigram"]  # which knows the letters of TEXTS alone


@pytest.mark.parametrize("kind", LOSSLESS)
def test_texts_come_back_byte_for_byte(kind, vocabularies):
    tokenizer = vocabularies[kind]
    texts = [*TEXTS, "", "日本語\u2028\U0001f9d1\u200d\U0001f680", "a" * 1000, " " * 99 + "x"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert [tokenizer.encode(text) for text in texts] == tokenizer.encode_batch(texts)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_byte_lengths_sum_to_the_bytes_of_the_text(kind, vocabularies):
    tokenizer = vocabularies[kind]
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    assert lengths[tokenizer.eot_id] == 0
    for text in TEXTS:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_no_text_becomes_a_special_token(tokenizer):
    for token in (EOT, *MARKERS):
        (index,) = control(tokenizer, token)
        text = f"a{token}b<{token}>{token.upper()} "
        ids = tokenizer.encode(text)
        assert index not in ids and tokenizer.encode_batch([text, text]) == [ids, ids]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, index]) == text


def test_only_template_text_is_split_at_special_tokens(tokenizer):
    assert control(tokenizer, EOT) == [tokenizer.eot_id]
    text = f"a{EOT}class A{EOT}{EOT}"
    ids = control(tokenizer, text)
    end = tokenizer.eot_id
    assert ids == [*tokenizer.encode("a"), end, *tokenizer.encode("class A"), end, end]
    assert control(tokenizer, TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert control(tokenizer, "") == []


def test_a_tokenizer_is_loaded_from_its_content(tokenizer):
    again = load_tokenizer(tokenizer.kind, tokenizer.content, EOT, "store/tokenizer")
    pickled = pickle.loads(pickle.dumps(tokenizer))
    for other in (again, pickled):
        assert type(other) is type(tokenizer)
        assert (other.content, other.sha256) == (tokenizer.content, tokenizer.sha256)
        assert (other.eot_id, other.vocab_size) == (tokenizer.eot_id, tokenizer.vocab_size)
        assert other.encode_batch([*TEXTS, EOT]) == tokenizer.encode_batch([*TEXTS, EOT])
        assert control(other, f"{MARKERS[0]}a{EOT}") == control(tokenizer, f"{MARKERS[0]}a{EOT}")
        assert (other.byte_lengths() == tokenizer.byte_lengths()).all()


def test_the_content_does_not_depend_on_how_the_vocabulary_was_read(tmp_path, tokenizer, vocabularies):
    (kind,) = [kind for kind, other in vocabularies.items() if other is tokenizer]
    assert vocabulary(kind, tmp_path).sha256 == tokenizer.sha256


def test_damaged_content_is_refused(tokenizer):
    whole, kind = tokenizer.content, tokenizer.kind
    cases = [(kind, content, EOT, "store/t") for content in (b"", b"{}", whole[: len(whole) // 2])]
    cases += [(other, whole, EOT, "store/t prepare") for other in ("tiktoken", "sentencepiece")]
    cases.append(("runes", whole, EOT, "runes update"))
    if kind != "bytes":
        cases.append((kind, whole, "<end>", "end_of_document=<end>"))
    for kind, content, end, named in cases:
        with raises(ConfigError, named):
            load_tokenizer(kind, content, end, "store/t")


@pytest.mark.parametrize("text", [*TEXTS, "🙂" * 9, "\ufffd real \ufffd\ufffd"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_stream_of_text_comes_out_whole(kind, vocabularies, text):
    decoder = StreamDecoder(vocabularies[kind])
    pieces = [decoder.push(token) for token in vocabularies[kind].encode(text)]
    assert "".join(pieces) + decoder.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "tiktoken", "bytes"])  # others: see StreamDecoder
def test_a_stream_of_any_ids_comes_out_as_decode_gives_it(kind, vocabularies):
    tokenizer = vocabularies[kind]
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(40)]
        decoder = StreamDecoder(tokenizer)
        text = "".join(decoder.push(token) for token in ids) + decoder.flush()
        assert text == tokenizer.decode(ids)


def test_ascii_is_never_held_back(tokenizer):
    decoder = StreamDecoder(tokenizer)
    assert all(decoder.push(token) for token in tokenizer.encode("class A: return x"))


def test_merges_that_are_strings_in_an_old_file_make_no_special_token():
    vocab = {token: index for index, token in enumerate(["<", ">", "s", "<s", "<s>", "a"])}
    backend = Backend(models.BPE(vocab, [("<", "s"), ("<s", ">")]))
    backend.add_special_tokens(["<s>"])
    tree = json.loads(backend.to_str())
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    tokenizer = JsonTokenizer.from_bytes(json.dumps(tree).encode(), "<s>", "old.json")
    assert tokenizer.encode("a<s>a") == [5, 3, 1, 5]


@pytest.mark.parametrize("prefix", ["first", "always", "never", "Prepend"])
def test_text_after_a_special_token_has_the_tokens_of_the_library(prefix):
    backend = Backend(models.BPE({"\u2581": 0, "a": 1, "<s>": 2, "\u2581a": 3}, [("\u2581", "a")]))
    if prefix == "Prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    backend.add_special_tokens(["<s>"])
    expected = backend.encode("a<s>a").ids
    assert control(JsonTokenizer.from_backend(backend, "<s>", "t.json"), "a<s>a") == expected
