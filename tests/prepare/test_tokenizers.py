"""Tokenizers of recipes: converted ones give what their libraries give, and what is wrong is said in one line."""

import hashlib
import io
import sys

import fsspec
import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public as public
from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.tokenizers import (
    Bytes,
    SentencePieceModel,
    Tiktoken,
    TokenizerFile,
    TrainBpe,
    convert,
    load,
    train_bpe,
)
from jaxinfra.prepare.tokenizers.tiktoken_ranks import PATTERNS, SPECIAL_TOKENS
from tests.vocabularies import EOT, MARKERS, TEXTS, control, rank_file, spm_file

REAL = "We've 12345 things'll\n\n  to DO, naïve 漢字 e\u0301 — iPhone's   \r\n\t!!/\n//x "


@pytest.fixture(scope="module")
def trained():
    return train_bpe(TEXTS, vocab_size=290, end_of_document=EOT)


def test_training_is_deterministic_and_survives_the_file(trained, tmp_path):
    again = train_bpe(TEXTS, vocab_size=290, end_of_document=EOT)
    assert again.sha256 == trained.sha256
    assert trained.eot_id == 0 and trained.vocab_size == 290
    path = tmp_path / "tokenizer.json"
    path.write_bytes(trained.content)
    loaded = load(TokenizerFile(path=str(path)))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == loaded.sha256 == trained.sha256
    assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)


def test_special_tokens_of_a_template_are_trained_with_the_rest():
    trained = train_bpe([*TEXTS, "".join(MARKERS) * 9], vocab_size=290, end_of_document=EOT, special_tokens=MARKERS)
    assert trained.special == {EOT: 0, MARKERS[0]: 1, MARKERS[1]: 2}
    assert control(trained, f"{MARKERS[0]}{EOT}") == [1, 0]
    assert not {0, 1, 2} & set(trained.encode("".join(MARKERS) + EOT))


def test_padding_and_truncation_of_a_file_do_not_apply(trained, tmp_path):
    backend = Backend.from_buffer(trained.content)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "t.json"))
    loaded = load(TokenizerFile(path=str(tmp_path / "t.json")))
    assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    assert loaded.sha256 == trained.sha256


def test_an_ordinary_token_that_ends_documents_becomes_special(tmp_path):
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.save(str(tmp_path / "t.json"))
    tokenizer = load(TokenizerFile(path=str(tmp_path / "t.json"), end_of_document="ab"))
    assert tokenizer.eot_id == 2
    assert tokenizer.encode("aabb") == [0, 0, 1, 1]
    assert control(tokenizer, "aabb") == [0, 2, 1]


def test_special_tokens_are_added_to_a_file_that_lacks_them(trained, tmp_path):
    (tmp_path / "t.json").write_bytes(trained.content)
    first, second = MARKERS
    tokenizer = load(TokenizerFile(path=str(tmp_path / "t.json"), special_tokens=MARKERS))
    assert control(tokenizer, f"{second}{first}") == [291, 290] and tokenizer.vocab_size == 292
    assert tokenizer.encode_batch([*TEXTS, first]) == trained.encode_batch([*TEXTS, first])
    (tmp_path / "more.json").write_bytes(tokenizer.content)
    again = load(TokenizerFile(path=str(tmp_path / "more.json"), special_tokens=(second,)))
    assert again.sha256 == tokenizer.sha256


def test_files_are_read_from_any_place(trained):
    with fsspec.open("memory://vocabularies/t.json", "wb") as file:
        file.write(trained.content)
    assert load(TokenizerFile(path="memory://vocabularies/t.json")).sha256 == trained.sha256


def test_public_encodings_are_those_of_the_library(monkeypatch):
    ranks = {bytes([value]): value for value in range(256)}
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)
    expected = {name: make() for name, make in public.ENCODING_CONSTRUCTORS.items()}
    assert {name: made["pat_str"] for name, made in expected.items()} == PATTERNS
    for name, special in SPECIAL_TOKENS.items():
        assert special == expected[name]["special_tokens"]


@pytest.mark.parametrize("encoding", SPECIAL_TOKENS)
def test_a_rank_file_gives_the_ids_of_the_library(encoding, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would keep the file for other tests
    path = rank_file(tmp_path / "ranks.tiktoken")
    tokenizer = load(Tiktoken(path=str(path), encoding=encoding))
    pattern, special = PATTERNS[encoding], SPECIAL_TOKENS[encoding]
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    expected = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: expected)
    found = load(Tiktoken(encoding=encoding))
    assert (found.sha256, found.special) == (tokenizer.sha256, tokenizer.special)
    for text in (REAL, *TEXTS, EOT):
        assert tokenizer.encode(text) == expected.encode_ordinary(text)
        assert control(tokenizer, text) == expected.encode(text, allowed_special="all")
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (special[EOT], expected.n_vocab)
    assert tokenizer.decode([special[EOT] - 1, ord("a")]) == "a"  # an id that the vocabulary leaves out


def test_long_gaps_are_encoded(tmp_path):
    tokenizer = load(Tiktoken(path=str(rank_file(tmp_path / "ranks")), encoding="gpt2"))
    for text in (" " * 1_200_000 + "a", "a" + " \n" * 400_000 + "b" + "\t" * 9 + "c" * 1_200_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_own_pattern_is_read_as_tiktoken_reads_it(tmp_path):
    """Counted repetitions that give nothing back are written in another way for the other library."""
    path, pattern = (
        str(rank_file(tmp_path / "ranks")),
        r"(?:cl){1,2}as|[a-z]{1,2}+s|\p{N}{1,3}+|[^a-z\p{N}]{1,3}+|[a-z]",
    )
    tokenizer = load(Tiktoken(path=path, pattern=pattern, special_tokens=(EOT,)))
    ranks = tiktoken.load.load_tiktoken_bpe(path)
    library = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in ("class classes clclass 1234567     x", *TEXTS):
        assert tokenizer.encode(text) == library.encode_ordinary(text)


def test_a_file_that_does_not_round_trip_is_refused(tmp_path):
    """Here `^` is the beginning of a text, and of every line for the library that runs the converted tokenizer."""
    path = str(rank_file(tmp_path / "ranks"))
    with pytest.raises(ConfigError, match="round-trip.*tokenizer=tokenizer_file") as error:
        load(Tiktoken(path=path, pattern=r"^..|[\s\S]", special_tokens=(EOT,)))
    assert "\n" not in str(error.value)
    _, check = convert(Tiktoken(path=path, pattern=r"^zz..|[\s\S]", special_tokens=(EOT,)))
    check(TEXTS)
    with pytest.raises(ConfigError, match=r"ranks: .*round-trip.*'x\\nzz  y'"):
        check(["x\nzz  y"])


def test_an_encoding_without_a_file_comes_from_the_cache_of_tiktoken(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="encoding=o200k_base: its file is not in tiktoken's cache"):
        load(Tiktoken(encoding="o200k_base"))
    with pytest.raises(ConfigError, match="encoding=none: .*use one of gpt2"):
        load(Tiktoken(encoding="none"))


SPM = {
    "as it is": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "bpe": {"model_type": "bpe", "user_defined_symbols": ["foo", "\n\n"]},
    "no prefix": {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["foo"]},
    "unigrams": {"user_defined_symbols": ["foo", "\n\n"]},
    "case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "letters": {"model_type": "char", "byte_fallback": False},
}


@pytest.mark.parametrize("case", SPM)
def test_models_of_sentencepiece_of_every_kind_give_the_ids_of_the_library(tmp_path, case):
    path, model = tmp_path / "spm.model", io.BytesIO()
    fields = {"vocab_size": 400, "hard_vocab_limit": False, "byte_fallback": True, "minloglevel": 2} | SPM[case]
    texts = [line for text in (REAL, *TEXTS) for line in text.split("\n")] * 10
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **fields)
    path.write_bytes(model.getvalue())
    tokenizer = load(SentencePieceModel(path=str(path)))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in (
        REAL,
        *TEXTS,
        "</s>",
        "</s><s><unk>",
        "<0x41>",
        "foo",
        " foo<0x41>foo\n\nfoo",
        "\u00c9\u0302 \uff76\uff9e",
    ):
        assert tokenizer.encode(text) == library.encode(text)
        if library.unk_id() not in library.encode(text):
            assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text))


def test_a_model_of_sentencepiece_gives_the_ids_of_the_library(tmp_path):
    path = spm_file(tmp_path / "spm.model")
    tokenizer = load(SentencePieceModel(path=str(path), end_of_document=EOT))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in (REAL, *TEXTS, EOT, "</s><s><unk>"):
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert library.piece_to_id(MARKERS[0]) in library.encode(MARKERS[0])  # which is what must not be
    assert tokenizer.vocab_size == library.get_piece_size()


def test_user_defined_pieces_may_be_left_to_texts(tmp_path):
    path = str(spm_file(tmp_path / "spm.model"))
    first, second = MARKERS
    tokenizer = load(SentencePieceModel(path=path, end_of_document=EOT, special_tokens=(first,)))
    (first_id,), (second_id,) = (control(tokenizer, marker) for marker in MARKERS)
    ids = tokenizer.encode(f"{first}\n\n{second}")
    assert first_id not in ids and second_id in ids
    assert tokenizer.encode("\n\n")[0] in ids
    assert tokenizer.byte_lengths()[[first_id, second_id]].tolist() == [0, len(second)]


def _plain_model(**fields):
    """As the library trains one that is told nothing else."""
    model = io.BytesIO()
    texts = iter(["hello world"] * 50)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, minloglevel=2, **fields)
    return model.getvalue()


UNUSABLE = {
    "no file": (lambda at: TokenizerFile(path=f"{at}/none.json"), r"none\.json: "),
    "no protocol": (lambda at: TokenizerFile(path="gopher://x/t.json"), r"gopher://x/t\.json: "),
    "no JSON": (lambda at: TokenizerFile(path=f"{at}/empty"), "empty: .*tokenizer.json"),
    "no end": (lambda at: TokenizerFile(path=f"{at}/bare.json"), "end_of_document=.*bare.json"),
    "no ranks": (lambda at: Tiktoken(path=f"{at}/bare.json"), "bare.json: line 1 .*file of ranks"),
    "few ranks": (lambda at: Tiktoken(path=f"{at}/empty"), "empty: .*no token for byte 0"),
    "two of a rank": (lambda at: Tiktoken(path=f"{at}/twice"), "twice: .*one rank"),
    "ranks, other end": (
        lambda at: Tiktoken(path=f"{at}/ranks", end_of_document="<end>"),
        r"end_of_document=<end>: .*<\|endofprompt\|>, <\|endoftext\|>",
    ),
    "ranks, bad pattern": (lambda at: Tiktoken(path=f"{at}/ranks", pattern="("), "ranks: .*check pattern"),
    "ranks over special tokens": (lambda at: Tiktoken(path=f"{at}/many", encoding="gpt2"), "many: id 50256"),
    "no model": (lambda at: SentencePieceModel(path=f"{at}/bare.json"), r"bare.json: .*give its \.model"),
    "empty model": (lambda at: SentencePieceModel(path=f"{at}/empty"), r"empty: .*give its \.model"),
    "model, other end": (
        lambda at: SentencePieceModel(path=f"{at}/spm.model", end_of_document="hello"),
        "end_of_document=hello: .*</s>, <s>",
    ),
    "model, no marker": (
        lambda at: SentencePieceModel(path=f"{at}/spm.model", special_tokens=("<turn>",)),
        "special_tokens: .*<turn>.*<s>, </s>",
    ),
    "model of words": (lambda at: SentencePieceModel(path=f"{at}/words.model"), "words.model: .*unigrams"),
}


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    at = tmp_path_factory.mktemp("unusable")
    (at / "empty").write_bytes(b"")
    Backend(models.BPE()).save(str(at / "bare.json"))
    rank_file(at / "ranks")
    (at / "twice").write_bytes((at / "ranks").read_bytes() + b"eHh4eA== 17\n")
    (at / "many").write_bytes((at / "ranks").read_bytes() + b"eHh4eA== 50256\n")
    (at / "spm.model").write_bytes(_plain_model(vocab_size=12))
    (at / "words.model").write_bytes(_plain_model(vocab_size=5, model_type="word"))
    return at


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_files_are_refused_in_one_line(case, unusable):
    config, message = UNUSABLE[case]
    with pytest.raises(ConfigError, match=message) as error:
        load(config(unusable))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("library", ["tiktoken", "sentencepiece"])
def test_a_missing_library_is_named_with_its_extra(library, unusable, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    config = {
        "tiktoken": Tiktoken(path=f"{unusable}/ranks"),
        "sentencepiece": SentencePieceModel(path=f"{unusable}/spm.model"),
    }[library]
    with pytest.raises(ConfigError, match=rf"pip install 'jaxinfra\[{library}\]'"):
        load(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainBpe(vocab_size=256), "vocab_size=256: .*vocab_size=257"),
        (TrainBpe(vocab_size=258, special_tokens=("<a>", "<b>")), "vocab_size=259 or more"),
        (TrainBpe(special_tokens=("<a>", "<a>")), "special_tokens="),
        (TrainBpe(special_tokens=("<|endoftext|>",)), "special_tokens="),
        (TrainBpe(end_of_document=""), "end_of_document="),
        (TokenizerFile(path=""), "path="),
        (Tiktoken(path="x", encoding="r50k"), "encoding=r50k: .*encoding=cl100k_base"),
        (Tiktoken(pattern="x"), "path=none"),
        (SentencePieceModel(path=""), "path="),
        (TokenizerFile(path="t.json", special_tokens=("",)), "special_tokens="),
        (Bytes(special_tokens=("<a>", "<a>")), "special_tokens="),
        (Bytes(end_of_document=""), "end_of_document="),
    ],
)
def test_descriptions_say_what_is_wrong_with_them(config, message):
    with pytest.raises(ConfigError, match=message):
        validate(config)
