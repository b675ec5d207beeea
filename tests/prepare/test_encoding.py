import io

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxinfra.prepare.documents.chat import Chat
from jaxinfra.prepare.documents.document import Span
from jaxinfra.prepare.documents.encoding import encode_documents
from jaxinfra.prepare.tokenizers import SentencePieceModel, TokenizerFile, load
from tests.vocabularies import BYTE_PIECES, EOT, MARKERS, TEXTS, control

TALK = [
    {"role": "user", "content": "  class é\n"},
    {"role": "assistant", "content": "\nas 漢 <|im_end|> b"},
    {"role": "user", "content": "as"},
    {"role": "assistant", "content": "class"},
]
PLAIN = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}{{ '\\n' }}{% endfor %}"


def encoded(tokenizer, *spans):
    (tokens,) = encode_documents(tokenizer, [spans])
    assert len(tokens.ids_N) == len(tokens.learned_N)
    parts = [part for span in spans for part in (tokenizer.split(span.text) if span.control else [span.text])]
    assert tokens.n_bytes == sum(len(part.encode()) for part in parts if isinstance(part, str))
    return tokens.ids_N.tolist(), tokens.learned_N.tolist()


def test_a_text_gets_its_tokens_all_of_them_learned(tokenizer):
    documents = [[Span(text=text)] for text in (*TEXTS, EOT, "")]
    for (span,), tokens in zip(documents, encode_documents(tokenizer, documents), strict=True):
        assert tokens.ids_N.tolist() == tokenizer.encode(span.text)
        assert tokens.learned_N.all()
    assert encoded(tokenizer) == ([], [])


def test_a_conversation_gets_the_tokens_of_its_template(tokenizer):
    (document,) = Chat().documents({"messages": TALK[2:]})
    ids, learned = encoded(tokenizer, *document)
    assert ids == control(tokenizer, "".join(span.text for span in document))
    answer = [*tokenizer.encode("class", inner=True), *control(tokenizer, "<|im_end|>")]
    (end,) = control(tokenizer, "<|im_end|>")
    assert ids.count(end) == 2 and learned[ids.index(end)] is False
    text = tokenizer.decode([i for i, is_learned in zip(ids, learned, strict=True) if is_learned])
    assert text == tokenizer.decode(answer)


def test_a_message_spells_no_special_token(tokenizer):
    (document,) = Chat().documents({"messages": TALK})
    ids, learned = encoded(tokenizer, *document)
    special = [i for i in ids if i in tokenizer.special.values()]
    assert special == [i for marker in MARKERS * 4 for i in control(tokenizer, marker)]
    assert encoded(tokenizer, Span(text=EOT), Span(text=EOT, control=True))[0][-1] == tokenizer.eot_id
    assert sum(learned) == len(learned) - learned.count(False) > 0


def test_a_token_across_a_boundary_is_learned(vocabularies):
    bpe = vocabularies["tiktoken"]  # which has tokens for two spaces and for "class"
    for unlearned, answer in (("a ", " b"), ("a  cl", "ass"), ("é\n", "\nb")):
        ids, learned = encoded(bpe, Span(text=unlearned, learned=False), Span(text=answer))
        assert ids == bpe.encode(unlearned + answer)
        before = len(bpe.encode(unlearned.rstrip(" \ncl")))
        assert learned == [False] * (len(learned) - sum(learned)) + [True] * sum(learned)
        assert before <= learned.index(True) < len(ids) and bpe.decode(ids[learned.index(True) :]).endswith(answer)
        ids, learned = encoded(bpe, Span(text=answer), Span(text=unlearned, learned=False))
        assert learned[0] and not learned[-1]


def test_no_token_is_learned_that_is_not_of_an_answer(tokenizer, tmp_path):
    (tmp_path / "plain.jinja").write_text(PLAIN)
    (document,) = Chat(template=str(tmp_path / "plain.jinja")).documents({"messages": TALK})
    ids, learned = encoded(tokenizer, *document)
    assert ids == tokenizer.encode("".join(span.text for span in document))
    answers = "".join(span.text for span in document if span.learned)
    text = tokenizer.decode([i for i, is_learned in zip(ids, learned, strict=True) if is_learned])
    assert text.replace(" ", "") == answers.replace(" ", "") or tokenizer.kind == "tokenizer_json"
    assert sum(map(len, text.split())) <= sum(map(len, answers.split())) + 4


@pytest.fixture(scope="module")
def rewriting(tmp_path_factory):
    """Vocabularies that put a space before a document, and rewrite texts."""
    folder = tmp_path_factory.mktemp("rewriting")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello wide world"] * 50),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spm.model").write_bytes(model.getvalue())
    words = ["<unk>", *BYTE_PIECES, *"▁abhelowid", "▁h", "he", "▁he"]
    merges = [("▁", "h"), ("▁h", "e"), ("h", "e")]
    backend = Backend(
        models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "t.json"))
    return {
        "sentencepiece": load(SentencePieceModel(path=str(folder / "spm.model"))),
        "json": load(TokenizerFile(path=str(folder / "t.json"), end_of_document="</s>")),
    }


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_a_space_is_put_before_a_document_and_nowhere_else(kind, rewriting):
    tokenizer = rewriting[kind]
    end = Span(text="</s>", control=True)
    ids, _ = encoded(tokenizer, Span(text="hello", control=True), end, Span(text="hello"), end)
    assert ids == [
        *tokenizer.encode("hello"),
        tokenizer.eot_id,
        *tokenizer.encode("hello", inner=True),
        tokenizer.eot_id,
    ]
    assert tokenizer.encode("hello") != tokenizer.encode("hello", inner=True)
    assert tokenizer.decode(ids) == "hellohello"


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_what_is_learned_is_found_where_texts_are_rewritten(kind, rewriting):
    tokenizer = rewriting[kind]
    spans = (Span(text="a\uff41\u3000he", learned=False), Span(text=" hello"), Span(text=" wide", learned=False))
    ids, learned = encoded(tokenizer, *spans)
    assert ids == tokenizer.encode("".join(span.text for span in spans))
    answer = tokenizer.decode([i for i, is_learned in zip(ids, learned, strict=True) if is_learned])
    assert answer.strip() == "hello"
