"""Tokenizers of recipes: conversion keeps ids and text, and unusable files are refused in one line."""

import hashlib
import sys

import fsspec
import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public as public
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.document import Span
from jaxinfra.prepare.documents.encoding import encode_documents
from jaxinfra.prepare.documents.formats import Chat
from jaxinfra.prepare.tokenizers import SentencePieceModel, Tiktoken, TokenizerFile, convert_tokenizer, train_bpe
from jaxinfra.prepare.tokenizers.tiktoken_ranks import PATTERNS, SPECIAL_TOKENS
from tests.refusals import raises
from tests.vocabularies import BYTE_PIECES, EOT, MARKERS, TEXTS, build_tokenizer, control, rank_file, spm_file

REAL = "We've 12345 things'll\n\n  to DO, naïve 漢字 e\u0301 — iPhone's   \r\n\t!!/\n//x "


@pytest.fixture(scope="module")
def trained():
    return train_bpe(TEXTS, vocab_size=290, end_of_document=EOT)


def test_training_is_deterministic_and_survives_saving(trained, tmp_path):
    again = train_bpe(TEXTS, vocab_size=290, end_of_document=EOT)
    assert again.sha256 == trained.sha256
    assert trained.eot_id == 0 and trained.vocab_size == 290
    path = tmp_path / "tokenizer.json"
    path.write_bytes(trained.content)
    loaded = build_tokenizer(TokenizerFile(path=str(path)))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == loaded.sha256 == trained.sha256
    assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)


def test_special_tokens_of_a_template_are_trained_with_the_rest():
    trained = train_bpe([*TEXTS, "".join(MARKERS) * 9], vocab_size=290, end_of_document=EOT, special_tokens=MARKERS)
    assert trained.special_tokens == {EOT: 0, MARKERS[0]: 1, MARKERS[1]: 2}
    assert control(trained, f"{MARKERS[0]}{EOT}") == [1, 0]
    assert not {0, 1, 2} & set(trained.encode("".join(MARKERS) + EOT))


def test_padding_and_truncation_of_a_file_are_ignored(trained, tmp_path):
    backend = Backend.from_buffer(trained.content)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "t.json"))
    loaded = build_tokenizer(TokenizerFile(path=str(tmp_path / "t.json")))
    assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    assert loaded.sha256 == trained.sha256


def test_an_ordinary_token_that_ends_documents_becomes_special(tmp_path):
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.save(str(tmp_path / "t.json"))
    tokenizer = build_tokenizer(TokenizerFile(path=str(tmp_path / "t.json"), end_of_document="ab"))
    assert tokenizer.eot_id == 2
    assert tokenizer.encode("aabb") == [0, 0, 1, 1]
    assert control(tokenizer, "aabb") == [0, 2, 1]


def test_special_tokens_are_added_to_a_file_that_lacks_them(trained, tmp_path):
    (tmp_path / "t.json").write_bytes(trained.content)
    first, second = MARKERS
    tokenizer = build_tokenizer(TokenizerFile(path=str(tmp_path / "t.json"), special_tokens=MARKERS))
    assert control(tokenizer, f"{second}{first}") == [291, 290] and tokenizer.vocab_size == 292
    assert tokenizer.encode_batch([*TEXTS, first]) == trained.encode_batch([*TEXTS, first])
    (tmp_path / "more.json").write_bytes(tokenizer.content)
    again = build_tokenizer(TokenizerFile(path=str(tmp_path / "more.json"), special_tokens=(second,)))
    assert again.sha256 == tokenizer.sha256


def test_files_are_read_from_any_place(trained):
    with fsspec.open("memory://vocabularies/t.json", "wb") as file:
        file.write(trained.content)
    assert build_tokenizer(TokenizerFile(path="memory://vocabularies/t.json")).sha256 == trained.sha256


def test_public_encodings_equal_those_of_tiktoken(monkeypatch):
    ranks = {bytes([value]): value for value in range(256)}
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)
    expected = {name: make() for name, make in public.ENCODING_CONSTRUCTORS.items()}
    assert {name: made["pat_str"] for name, made in expected.items()} == PATTERNS
    for name, special in SPECIAL_TOKENS.items():
        assert special == expected[name]["special_tokens"]


@pytest.mark.parametrize("encoding", SPECIAL_TOKENS)
def test_a_rank_file_gives_the_ids_of_tiktoken(encoding, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would keep the file for other tests
    path = rank_file(tmp_path / "ranks.tiktoken")
    tokenizer = build_tokenizer(Tiktoken(path=str(path), encoding=encoding))
    pattern, special = PATTERNS[encoding], SPECIAL_TOKENS[encoding]
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    expected = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: expected)
    found = build_tokenizer(Tiktoken(encoding=encoding))
    assert (found.sha256, found.special_tokens) == (tokenizer.sha256, tokenizer.special_tokens)
    for text in (REAL, *TEXTS, EOT):
        assert tokenizer.encode(text) == expected.encode_ordinary(text)
        assert control(tokenizer, text) == expected.encode(text, allowed_special="all")
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (special[EOT], expected.n_vocab)
    assert tokenizer.decode([special[EOT] - 1, ord("a")]) == "a"  # an id that the vocabulary leaves out


def test_long_runs_of_white_space_are_encoded(tmp_path):
    tokenizer = build_tokenizer(Tiktoken(path=str(rank_file(tmp_path / "ranks")), encoding="gpt2"))
    for text in (" " * 1_200_000 + "a", "a" + " \n" * 400_000 + "b" + "\t" * 9 + "c" * 1_200_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_custom_pattern_splits_as_in_tiktoken(tmp_path):
    """Possessive counted repetitions need another syntax in the library `tokenizers`."""
    path, pattern = (
        str(rank_file(tmp_path / "ranks")),
        r"(?:cl){1,2}as|[a-z]{1,2}+s|\p{N}{1,3}+|[^a-z\p{N}]{1,3}+|[a-z]",
    )
    tokenizer = build_tokenizer(Tiktoken(path=path, pattern=pattern, special_tokens=(EOT,)))
    ranks = tiktoken.load.load_tiktoken_bpe(path)
    library = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in ("class classes clclass 1234567     x", *TEXTS):
        assert tokenizer.encode(text) == library.encode_ordinary(text)


def test_a_file_that_does_not_round_trip_is_refused(tmp_path):
    """`^` is the beginning of the text for tiktoken, and of every line after conversion."""
    path = str(rank_file(tmp_path / "ranks"))
    with raises(ConfigError, "round-trip tokenizer=tokenizer_file"):
        build_tokenizer(Tiktoken(path=path, pattern=r"^..|[\s\S]", special_tokens=(EOT,)))
    _, check = convert_tokenizer(Tiktoken(path=path, pattern=r"^zz..|[\s\S]", special_tokens=(EOT,)))
    check(TEXTS)
    with raises(ConfigError, r"ranks: round-trip 'x\nzz  y'"):
        check(["x\nzz  y"])


def test_an_encoding_without_a_path_is_looked_up_by_tiktoken(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with raises(ConfigError, "encoding=o200k_base: tiktoken's cache"):
        build_tokenizer(Tiktoken(encoding="o200k_base"))
    with raises(ConfigError, "encoding=none: use gpt2"):
        build_tokenizer(Tiktoken(encoding="none"))


SPM = {
    "as it is": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "bpe": {"model_type": "bpe", "user_defined_symbols": ["foo", "\n\n"]},
    "no prefix": {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["foo"]},
    "unigrams": {"user_defined_symbols": ["foo", "\n\n"]},
    "case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "letters": {"model_type": "char", "byte_fallback": False},
}


@pytest.mark.parametrize("case", SPM)
def test_sentencepiece_models_give_the_ids_of_the_library(tmp_path, case):
    texts = [line for text in (REAL, *TEXTS) for line in text.split("\n")] * 10
    fields = {"vocab_size": 400, "hard_vocab_limit": False, "byte_fallback": True} | SPM[case]
    path = spm_file(tmp_path / "spm.model", texts, **fields)
    tokenizer = build_tokenizer(SentencePieceModel(path=str(path)))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    odd = ("</s>", "</s><s><unk>", "<0x41>", "foo", " foo<0x41>foo\n\nfoo", "\u00c9\u0302 \uff76\uff9e")
    for text in (REAL, *TEXTS, *odd):
        assert tokenizer.encode(text) == library.encode(text)
        if library.unk_id() not in library.encode(text):
            assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text))


def test_user_defined_pieces_may_stay_ordinary(tmp_path):
    path = str(spm_file(tmp_path / "spm.model"))
    first, second = MARKERS
    tokenizer = build_tokenizer(SentencePieceModel(path=path, end_of_document=EOT, special_tokens=(first,)))
    (first_id,), (second_id,) = (control(tokenizer, marker) for marker in MARKERS)
    ids = tokenizer.encode(f"{first}\n\n{second}")
    assert first_id not in ids and second_id in ids
    assert tokenizer.encode("\n\n")[0] in ids
    assert tokenizer.byte_lengths()[[first_id, second_id]].tolist() == [0, len(second)]


UNUSABLE = {
    "no file": (lambda at: TokenizerFile(path=f"{at}/none.json"), "none.json: "),
    "no protocol": (lambda at: TokenizerFile(path="gopher://x/t.json"), "gopher://x/t.json: "),
    "no JSON": (lambda at: TokenizerFile(path=f"{at}/empty"), "empty: tokenizer.json"),
    "no end": (lambda at: TokenizerFile(path=f"{at}/bare.json"), "end_of_document= bare.json"),
    "no ranks": (lambda at: Tiktoken(path=f"{at}/bare.json"), "bare.json: line 1 ranks"),
    "few ranks": (lambda at: Tiktoken(path=f"{at}/empty"), "empty: byte 0"),
    "two of a rank": (lambda at: Tiktoken(path=f"{at}/twice"), "twice: rank"),
    "ranks, other end": (
        lambda at: Tiktoken(path=f"{at}/ranks", end_of_document="<end>"),
        "end_of_document=<end>: <|endofprompt|>, <|endoftext|>",
    ),
    "ranks, bad pattern": (lambda at: Tiktoken(path=f"{at}/ranks", pattern="("), "ranks: check pattern"),
    "ranks over special tokens": (lambda at: Tiktoken(path=f"{at}/many", encoding="gpt2"), "many: id 50256"),
    "no model": (lambda at: SentencePieceModel(path=f"{at}/bare.json"), "bare.json: .model"),
    "empty model": (lambda at: SentencePieceModel(path=f"{at}/empty"), "empty: .model"),
    "model, other end": (
        lambda at: SentencePieceModel(path=f"{at}/spm.model", end_of_document="hello"),
        "end_of_document=hello: </s>, <s>",
    ),
    "model, no marker": (
        lambda at: SentencePieceModel(path=f"{at}/spm.model", special_tokens=("<turn>",)),
        "special_tokens: <turn> <s>, </s>",
    ),
    "model of words": (lambda at: SentencePieceModel(path=f"{at}/words.model"), "words.model: unigrams"),
}


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    at = tmp_path_factory.mktemp("unusable")
    (at / "empty").write_bytes(b"")
    Backend(models.BPE()).save(str(at / "bare.json"))
    rank_file(at / "ranks")
    (at / "twice").write_bytes((at / "ranks").read_bytes() + b"eHh4eA== 17\n")
    (at / "many").write_bytes((at / "ranks").read_bytes() + b"eHh4eA== 50256\n")
    spm_file(at / "spm.model", ["hello world"] * 50, vocab_size=12)
    spm_file(at / "words.model", ["hello world"] * 50, vocab_size=5, model_type="word")
    return at


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_files_are_refused(case, unusable):
    config, named = UNUSABLE[case]
    with raises(ConfigError, named):
        build_tokenizer(config(unusable))


@pytest.mark.parametrize(
    ("library", "config"), [("tiktoken", Tiktoken(path="x")), ("sentencepiece", SentencePieceModel(path="x"))]
)
def test_a_missing_library_is_named_with_its_extra(library, config, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with raises(ConfigError, f"pip install 'jaxinfra[{library}]'"):
        build_tokenizer(config)


TALK = [
    {"role": "user", "content": "  class é\n"},
    {"role": "assistant", "content": "\nas 漢 <|im_end|> b"},
    {"role": "user", "content": "as"},
    {"role": "assistant", "content": "class"},
]
PLAIN = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}{{ '\\n' }}{% endfor %}"


def encoded(tokenizer, *spans):
    (tokens,) = encode_documents(tokenizer, [spans])
    assert len(tokens.ids_N) == len(tokens.in_loss_N)
    parts = [part for span in spans for part in (tokenizer.split(span.text) if span.from_template else [span.text])]
    assert tokens.num_bytes == sum(len(part.encode()) for part in parts if isinstance(part, str))
    return tokens.ids_N.tolist(), tokens.in_loss_N.tolist()


def test_all_tokens_of_a_text_count_in_the_loss(tokenizer):
    documents = [[Span(text=text)] for text in (*TEXTS, EOT, "")]
    for (span,), tokens in zip(documents, encode_documents(tokenizer, documents), strict=True):
        assert tokens.ids_N.tolist() == tokenizer.encode(span.text)
        assert tokens.in_loss_N.all()
    assert encoded(tokenizer) == ([], [])


def test_a_conversation_gets_the_tokens_of_its_template(tokenizer):
    (document,) = Chat().to_documents({"messages": TALK[2:]})
    ids, in_loss = encoded(tokenizer, *document)
    assert ids == control(tokenizer, "".join(span.text for span in document))
    answer = [*tokenizer.encode("class", continuation=True), *control(tokenizer, "<|im_end|>")]
    (end,) = control(tokenizer, "<|im_end|>")
    assert ids.count(end) == 2 and not in_loss[ids.index(end)]
    text = tokenizer.decode([i for i, is_in_loss in zip(ids, in_loss, strict=True) if is_in_loss])
    assert text == tokenizer.decode(answer)


def test_a_message_never_becomes_a_special_token(tokenizer):
    (document,) = Chat().to_documents({"messages": TALK})
    ids, in_loss = encoded(tokenizer, *document)
    special = [i for i in ids if i in tokenizer.special_tokens.values()]
    assert special == [i for marker in MARKERS * 4 for i in control(tokenizer, marker)]
    assert encoded(tokenizer, Span(text=EOT), Span(text=EOT, from_template=True))[0][-1] == tokenizer.eot_id
    assert sum(in_loss) == len(in_loss) - in_loss.count(False) > 0


def test_a_token_across_a_boundary_counts_in_the_loss(vocabularies):
    bpe = vocabularies["tiktoken"]  # which has tokens for two spaces and for "class"
    for prompt, answer in (("a ", " b"), ("a  cl", "ass"), ("é\n", "\nb")):
        ids, in_loss = encoded(bpe, Span(text=prompt, in_loss=False), Span(text=answer))
        assert ids == bpe.encode(prompt + answer)
        before = len(bpe.encode(prompt.rstrip(" \ncl")))
        assert in_loss == [False] * (len(in_loss) - sum(in_loss)) + [True] * sum(in_loss)
        assert before <= in_loss.index(True) < len(ids) and bpe.decode(ids[in_loss.index(True) :]).endswith(answer)
        ids, in_loss = encoded(bpe, Span(text=answer), Span(text=prompt, in_loss=False))
        assert in_loss[0] and not in_loss[-1]


def test_only_tokens_of_answers_count_in_the_loss(tokenizer, tmp_path):
    (tmp_path / "plain.jinja").write_text(PLAIN)
    (document,) = Chat(template=str(tmp_path / "plain.jinja")).to_documents({"messages": TALK})
    ids, in_loss = encoded(tokenizer, *document)
    assert ids == tokenizer.encode("".join(span.text for span in document))
    answers = "".join(span.text for span in document if span.in_loss)
    text = tokenizer.decode([i for i, is_in_loss in zip(ids, in_loss, strict=True) if is_in_loss])
    assert text.replace(" ", "") == answers.replace(" ", "") or tokenizer.kind == "tokenizer_json"
    assert sum(map(len, text.split())) <= sum(map(len, answers.split())) + 4


@pytest.fixture(scope="module")
def rewriting(tmp_path_factory):
    """Vocabularies that add a dummy prefix to a document and normalize text."""
    folder = tmp_path_factory.mktemp("rewriting")
    fields = {"vocab_size": 290, "byte_fallback": True, "hard_vocab_limit": False}
    spm_file(folder / "spm.model", ["hello wide world"] * 50, **fields)
    words = ["<unk>", *BYTE_PIECES, *"▁abhelowid", "▁h", "he", "▁he"]
    merges = [("▁", "h"), ("▁h", "e"), ("h", "e")]
    backend = Backend(
        models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "t.json"))
    return [
        build_tokenizer(SentencePieceModel(path=str(folder / "spm.model"))),
        build_tokenizer(TokenizerFile(path=str(folder / "t.json"), end_of_document="</s>")),
    ]


def test_a_dummy_prefix_is_added_once_per_document(rewriting):
    end = Span(text="</s>", from_template=True)
    spans = (Span(text="a\uff41\u3000he", in_loss=False), Span(text=" hello"), Span(text=" wide", in_loss=False))
    for tokenizer in rewriting:
        ids, _ = encoded(tokenizer, Span(text="hello", from_template=True), end, Span(text="hello"), end)
        eot_id = tokenizer.eot_id
        assert ids == [*tokenizer.encode("hello"), eot_id, *tokenizer.encode("hello", continuation=True), eot_id]
        assert tokenizer.encode("hello") != tokenizer.encode("hello", continuation=True)
        assert tokenizer.decode(ids) == "hellohello"
        ids, in_loss = encoded(tokenizer, *spans)
        assert ids == tokenizer.encode("".join(span.text for span in spans))
        answer = tokenizer.decode([i for i, is_in_loss in zip(ids, in_loss, strict=True) if is_in_loss])
        assert answer.strip() == "hello"
