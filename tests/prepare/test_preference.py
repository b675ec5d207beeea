import pytest

from jaxinfra.config import decode, encode, validate
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.chat import Chat
from jaxinfra.prepare.documents.document import RecordError
from jaxinfra.prepare.documents.forms import AnyForm
from jaxinfra.prepare.documents.preference import Completion, Preference

ASKED = [{"role": "user", "content": "2+2?"}]
GOOD, WORSE = [{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "5"}]
SPELT = [
    ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n", ["4", "<|im_end|>"]),
    ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n", ["5", "<|im_end|>"]),
]


def shown(documents):
    return [
        ("".join(span.text for span in document), [span.text for span in document if span.learned])
        for document in documents
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": ASKED, "chosen": GOOD, "rejected": WORSE},
        {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + WORSE},
        {"prompt": "2+2?", "chosen": ASKED + GOOD, "rejected": ASKED + WORSE},
    ],
)
def test_a_prompt_with_two_answers_gives_two_documents(record):
    form = Preference()
    assert len(form.documents(record)) == form.group
    assert shown(form.documents(record)) == SPELT


def test_conversations_without_a_prompt_share_their_beginning():
    talk = [*ASKED, *GOOD, {"role": "user", "content": "And 3+3?"}]
    record = {"chosen": [*talk, {"role": "assistant", "content": "6"}], "rejected": [*talk, *GOOD]}
    (chosen, rejected) = shown(Preference(prompt=None).documents(record))
    assert (chosen[1], rejected[1]) == (["6", "<|im_end|>"], ["4", "<|im_end|>"])
    assert chosen[0].startswith(SPELT[0][0]) and rejected[0].startswith(SPELT[0][0])


def test_texts_are_joined_where_there_is_no_template():
    record = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    assert shown(Preference(template=None).documents(record)) == [("2+2=4", ["4"]), ("2+2=5", ["5"])]
    assert not any(span.control for document in Preference(template=None).documents(record) for span in document)


def test_a_completion_is_learned_and_its_prompt_is_not():
    assert shown(Completion().documents({"prompt": "2+2=", "completion": "4"})) == [("2+2=4", ["4"])]
    assert shown(Completion().documents({"prompt": "", "completion": "4"})) == [("4", ["4"])]
    form = Completion(completion="answer", template="chatml")
    for answer in ("4", GOOD):
        assert shown(form.documents({"prompt": "2+2?", "answer": answer})) == SPELT[:1]


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        (Preference(), {"prompt": "a", "chosen": "b"}, "rejected.*prompt, chosen"),
        (Preference(), {"prompt": "a", "chosen": "b", "rejected": 1}, "rejected is int"),
        (Preference(), {"prompt": ASKED, "chosen": ASKED, "rejected": WORSE}, "chosen has no message of the assistant"),
        (Preference(), {"prompt": "a", "chosen": " ", "rejected": "c"}, "message 1 of chosen is empty"),
        (Preference(prompt=None), {"chosen": GOOD, "rejected": WORSE}, "begin with different messages"),
        (
            Preference(prompt=None),
            {"chosen": ASKED + GOOD, "rejected": ASKED + GOOD},
            "has no message of the assistant",
        ),
        (Preference(template=None), {"prompt": ASKED, "chosen": "b", "rejected": "c"}, "prompt is list"),
        (Completion(), {"prompt": "a", "completion": ""}, "the answer is empty"),
        (Completion(), {"prompt": "a", "completion": None}, "completion is NoneType"),
    ],
)
def test_records_without_answers_are_refused_with_the_cause(form, record, message):
    with pytest.raises(RecordError, match=message):
        form.documents(record)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Preference(chosen=""), "chosen=.*chosen=chosen"),
        (Preference(template="alpaca"), "template=alpaca: .*template=chatml"),
        (Preference(prompt=None, template=None), "prompt=none, template=none: .*template=chatml"),
        (Completion(prompt=""), "prompt=.*prompt=prompt"),
        (Completion(template=""), "template=.*template=chatml"),
    ],
)
def test_forms_say_what_is_wrong_with_them(form, message):
    with pytest.raises(ConfigError, match=message):
        validate(form)


def test_every_form_says_what_its_documents_are():
    documents = {Chat: (True, 1), Completion: (True, 1), Preference: (True, 2)}
    for form in (Chat(learn="last"), Completion(), Preference(template=None)):
        assert (form.masked, form.group) == documents[type(form)]
        assert decode(type(form), encode(form)) == form
    assert set(documents) < set(AnyForm.__args__)
