import hashlib
import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxinfra.data.tokenizer import StreamDecoder, Tokenizer
from jaxinfra.errors import ConfigError

EOT = "<|endoftext|>"
TEXTS = ["def naïve(x):\n\treturn  'é漢字 🙂'\n" * 5, "class A:\n    pass\n" * 20, "\r\n  \x00 tail"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(TEXTS, vocab_size=290, end_of_document=EOT)


def test_texts_come_back_byte_for_byte(tokenizer):
    texts = [*TEXTS, "", "日本語\u2028\U0001f9d1\u200d\U0001f680", "a" * 1000]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert tokenizer.encode(TEXTS[0]) == tokenizer.encode_batch(TEXTS)[0]


def test_training_is_deterministic_and_survives_the_file(tokenizer, tmp_path):
    again = Tokenizer.train_bpe(TEXTS, vocab_size=290, end_of_document=EOT)
    assert again.sha256 == tokenizer.sha256
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path, EOT)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == loaded.sha256 == tokenizer.sha256
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_no_text_spells_the_end_of_a_document(tokenizer):
    assert tokenizer.eot_id == 0
    ids = tokenizer.encode(f"a{EOT}b")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == f"a{EOT}b"
    assert tokenizer.decode([*ids, tokenizer.eot_id]) == f"a{EOT}b"


def test_padding_and_truncation_of_a_file_do_not_apply(tokenizer, tmp_path):
    backend = Backend.from_str(tokenizer.json)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json", EOT).encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_byte_lengths_sum_to_the_bytes_of_the_text(tokenizer):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.eot_id] == 0
    for text in TEXTS:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("text", [*TEXTS, "🙂" * 9, "\ufffd real \ufffd\ufffd"])
def test_a_stream_of_text_comes_out_whole(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_of_any_ids_comes_out_as_decode_gives_it(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(40)]
        decoder = StreamDecoder(tokenizer)
        text = "".join(decoder.push(token) for token in ids) + decoder.flush()
        assert text == tokenizer.decode(ids)


def test_ascii_is_never_held_back(tokenizer):
    decoder = StreamDecoder(tokenizer)
    assert all(decoder.push(token) for token in tokenizer.encode("class A: return x"))


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path / "none.json", EOT)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json: is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json", EOT)
    Backend(models.BPE()).save(str(tmp_path / "bare.json"))
    with pytest.raises(ConfigError, match="no such token"):
        Tokenizer.load(tmp_path / "bare.json", EOT)
