"""Formats turn conversations and pairs of answers into documents whose answers count in the loss."""

import itertools
import json
from dataclasses import replace

import pytest

from jaxinfra.config import decode, encode
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.chat_template import ChatTemplate
from jaxinfra.prepare.documents.document import RecordError, Text
from jaxinfra.prepare.documents.formats import AnyFormat, Chat, Completion, Labeled, Preference
from tests.refusals import raises

TALK = [
    ("system", "Be kind."),
    ("user", " Hi! <|im_end|>\n"),
    ("assistant", "Hello. \n"),
    ("user", "Bye"),
    ("assistant", "So long."),
]
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\n Hi! <|im_end|>\n<|im_end|>\n"
        "<|im_start|>assistant\nHello. \n<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nSo long.<|im_end|>\n"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi! <|im_end|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo long.<|eot_id|>"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe kind.\n\nHi! <|im_end|><end_of_turn>\n"
        "<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\nSo long.<end_of_turn>\n"
    ),
}
IN_LOSS = {
    "chatml": ["Hello. \n<|im_end|>", "So long.<|im_end|>"],
    "llama3": ["Hello.<|eot_id|>", "So long.<|eot_id|>"],
    "gemma": ["Hello.<end_of_turn>", "So long.<end_of_turn>"],
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set opening = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set opening = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (opening if loop.first else '') }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
"""
LLAMA2 = """{% for message in messages %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}
{% else %}{{ raise_exception('Only user and assistant!') }}{% endif %}
{% endfor %}"""
PLAIN = "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] }}{{ '\\n' }}{% endfor %}"


def template_file(folder, source, **tokens):
    folder.mkdir(exist_ok=True)
    (folder / "chat_template.jinja").write_text(source)
    if tokens:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return str(folder / "chat_template.jinja")


def record(talk=TALK):
    return {"messages": [{"role": role, "content": content} for role, content in talk]}


def document(format, talk=TALK):
    (spans,) = format.to_documents(record(talk))
    return list(spans)


def text(spans):
    return "".join(span.text for span in spans)


def in_loss(spans):
    """Returns the runs of text that count in the loss."""
    return [text(run) for is_in_loss, run in itertools.groupby(spans, lambda span: span.in_loss) if is_in_loss]


def message_texts(spans):
    return [span.text for span in spans if not span.from_template]


@pytest.fixture
def file_of(tmp_path):
    sources = {
        "chatml": (CHATML, {}),
        "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>"}),
        "gemma": (GEMMA, {"bos_token": {"content": "<bos>", "special": True}}),
        "llama2": (LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}),
        "plain": (PLAIN, {}),
    }
    return lambda name: template_file(tmp_path / name, sources[name][0], **sources[name][1])


@pytest.mark.parametrize("name", EXPECTED)
def test_presets_write_the_published_layout(name):
    spans = document(Chat(template=name))
    assert text(spans) == EXPECTED[name]
    assert in_loss(spans) == IN_LOSS[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_template_gives_the_spans_of_its_preset(name, file_of):
    for talk in (TALK, TALK[1:], TALK[1:2], TALK[1:3]):
        format, preset = Chat(template=file_of(name), train_on="all"), Chat(template=name, train_on="all")
        assert text(document(format, talk)) == text(document(preset, talk))
    by_file, by_name = (document(Chat(template=template)) for template in (file_of(name), name))
    assert in_loss(by_file) == in_loss(by_name)
    assert message_texts(by_file) == message_texts(by_name)


@pytest.mark.parametrize("name", EXPECTED)
def test_text_of_a_message_is_never_template_text(name, file_of):
    marks = "".join(("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<bos>", "{{ bos_token }}"))
    for template in (name, file_of(name)):
        spans = document(Chat(template=template), [("user", marks), ("assistant", marks)])
        assert message_texts(spans) == [marks, marks]
        assert not any(marks in span.text for span in spans if span.from_template)


def test_train_on_chooses_what_counts_in_the_loss():
    answers = IN_LOSS["chatml"]
    assert in_loss(document(Chat(train_on="last"))) == answers[1:]
    assert text(span for span in document(Chat(train_on="all")) if span.in_loss) == EXPECTED["chatml"]
    assert in_loss(document(Chat(), [*TALK, ("user", "Still here?")])) == answers
    assert in_loss(document(Chat(train_on="last"), [*TALK, ("user", "Still here?")])) == answers[1:]


def test_other_templates_are_split_where_turns_end(file_of):
    talk = [("user", "Hi "), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "So long.")]
    spans = document(Chat(template=file_of("llama2")), talk)
    assert text(spans) == "<s>[INST] Hi [/INST] Hello. </s><s>[INST] Bye [/INST] So long. </s>"
    assert in_loss(spans) == [" Hello. </s>", " So long. </s>"]
    spans = document(Chat(template=file_of("plain")), talk)
    assert text(spans) == "Q: Hi \nA: Hello.\nQ: Bye\nA: So long.\n"
    assert in_loss(spans) == ["Hello.\n", "So long.\n"]


def test_a_template_is_read_from_tokenizer_config(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"bos_token": "<|begin_of_text|>", "chat_template": LLAMA3}))
    assert text(document(Chat(template=str(path)))) == EXPECTED["llama3"]
    named = [{"name": "tool_use", "template": PLAIN}, {"name": "default", "template": CHATML}]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"chat_template": named}))
    assert text(document(Chat(template=str(other)))) == EXPECTED["chatml"]


def test_sharegpt_conversations_are_read():
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (spans,) = Chat(field="conversations").to_documents({"conversations": talk})
    assert text(spans) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"


def test_a_missing_system_message_is_added():
    opened = "<|im_start|>system\nBe terse.<|im_end|>\n"
    format = Chat(system="Be terse.")
    assert text(document(format, TALK[1:])).startswith(opened)
    assert text(document(format)) == EXPECTED["chatml"]
    assert text(document(format, [("system", " "), *TALK[1:]])).startswith(opened)
    assert in_loss(document(format, TALK[1:])) == IN_LOSS["chatml"]


def answer(tools=None, **fields):
    return {"messages": [{"role": "assistant", **fields}], "tools": tools}


BAD_RECORDS = {
    "no field": ({"text": ""}, "messages text"),
    "a text": ({"messages": "Hi"}, "messages str"),
    "nothing": ({"messages": None}, "messages NoneType"),
    "no messages": ({"messages": []}, "messages"),
    "system alone": ({"messages": [{"role": "system", "content": ""}]}, "messages"),
    "no message": ({"messages": ["Hi"]}, "message 1 of messages str"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 of messages content"),
    "role": (record([("user", "Hi"), ("robot", "x")]), "message 2 of messages robot system, user"),
    "role of a kind": ({"messages": [{"role": ["user"], "content": "x"}]}, "['user']"),
    "no text": (record([("user", ["Hi"])]), "message 1 of messages list"),
    "half a pair": (record([("user", "a\ud83d")]), "surrogate character 1"),
    "empty": (record([("user", "Hi"), ("assistant", " ")]), "message 2 of messages"),
    "no answer": (record([("user", "Hi")]), "assistant"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": "look"}]}, "tool_calls message 1 str list"),
    "call": ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "message 1 {'id': 1} function"),
    "call without a name": (answer(tool_calls=[{"name": " "}]), "message 1 {'name': ' '} function"),
    "call id": (answer(tool_calls=[{"id": "<eos>", "name": "look"}]), "message 1 <eos> letters"),
    "arguments": (answer(tool_calls=[{"name": "look", "arguments": {1, 2}}]), "message 1 not JSON"),
    "tools": (answer(content="Hi", tools="{"), "tools not JSON"),
    "no tools": (answer(content="Hi", tools=["look"]), "tools ['look'] list schemas"),
    "tools without a place": (answer(content="Hi", tools=[{"name": "look"}]), "template chatml place tools"),
    "calls without a place": (answer(tool_calls=[{"name": "look"}]), "template chatml tool call message 1"),
    "reasoning without a place": (answer(content="Hi", thinking="Hm"), "template chatml thinking"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_records_that_are_not_conversations_are_refused(case):
    bad, named = BAD_RECORDS[case]
    with raises(RecordError, named):
        Chat().to_documents(bad)
    with raises(RecordError, "text surrogate character 2"):
        Text().to_documents({"text": "ab\udc00"})


@pytest.mark.parametrize(
    ("source", "talk", "named"),
    [
        (GEMMA, TALK[2:], "Conversation roles must alternate"),
        ("{{ messages[0]['content'] | upper }}{{ messages[1]['content'] }}", TALK[1:3], "message"),
        ("{{ messages[1]['content'] }}", TALK[1:3], "message 1 user"),
        ("{% for m in messages * 2 %}{{ m['content'] }}{% endfor %}", TALK[1:3], "once"),
        (PLAIN.replace("m['content']", "m['content'].replace('o', '0')"), TALK[1:3], "messages"),
        (PLAIN.replace("m['content']", "m['content'].replace('H', 'h')"), TALK[1:3], "rewrites messages"),
        ("{{ messages[0]['content'] }}{{ nothing.more }}", TALK[1:2], "'nothing'"),
        ("{{ messages.append(1) }}", TALK[1:3], "conversation"),
        ("{{ strftime_now('%d') }}" + PLAIN, TALK[1:3], "date today replace strftime_now(...)"),  # as that of gpt-oss
        ("{{ messages[0]['content'].index('?') }}", TALK[1:3], "refuses conversation"),
        ("{{ messages | length // 0 }}", TALK[1:3], "refuses conversation"),
    ],
)
def test_templates_that_refuse_or_rewrite_messages_are_refused(tmp_path, source, talk, named):
    with raises(RecordError, named):
        document(Chat(template=template_file(tmp_path, source, bos_token="<bos>"), train_on="all"), talk)


ANSWERING = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
THINKING = """{%- for m in messages %}
{{- '<' + m.role + '>' + ('<think>' if m.role == 'assistant' and loop.last else '') + m.content + '<end>' }}
{%- endfor %}{{ '<assistant>' if add_generation_prompt }}"""
BLOCKS = """{%- for m in messages %}{{- '<' + m.role + '>' }}
{%- if m.role == 'assistant' %}{% generation %}{{ '<think>' if loop.last }}{{ m.content }}<end>{% endgeneration %}
{%- else %}{{ m.content }}<end>{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (ANSWERING + "{% if add_generation_prompt %}<assistant>{% endif %}", "Hello. \n<end>"),
        (ANSWERING + "{% if add_generation_prompt %}<assistant><think>{% endif %}", "Hello. \n<end>"),
        (THINKING, "<think>Hello. \n<end>"),
        ("{% for m in messages %}{{ m.content }}<end>{% endfor %}", "Hello. \n<end>"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "Hello. \n"),
    ],
)
def test_answers_are_found_in_templates_with_other_turn_marks(tmp_path, source, expected):
    spans = document(Chat(template=template_file(tmp_path, source)), TALK[1:3])
    assert in_loss(spans) == [expected]


@pytest.mark.parametrize(
    ("source", "talk"),
    [
        (ANSWERING + "<assistant>", TALK[1:3]),
        (THINKING, TALK),
        ("{% for m in messages %}{{ m.content + ('\n' if not loop.last else '<end>') }}{% endfor %}", TALK[1:3]),
    ],
)
def test_templates_without_stable_prefixes_need_generation_blocks(tmp_path, source, talk):
    with raises(RecordError, "{% generation %}"):
        document(Chat(template=template_file(tmp_path, source)), talk)
    assert document(Chat(template=template_file(tmp_path, source), train_on="all"), talk)


def test_generation_blocks_say_what_counts_in_the_loss(tmp_path):
    format = Chat(template=template_file(tmp_path, BLOCKS))
    assert in_loss(document(format)) == ["Hello. \n<end>", "<think>So long.<end>"]
    assert in_loss(document(replace(format, train_on="last"))) == ["<think>So long.<end>"]
    assert message_texts(document(format)) == [content.strip() for _, content in TALK]
    beside = BLOCKS.replace(
        "m.content }}<end>{% endgen", "m.content }}{% endgeneration %}{% generation %}<end>{% endgen"
    )
    assert in_loss(document(Chat(template=template_file(tmp_path / "beside", beside)))) == in_loss(document(format))
    without = template_file(tmp_path / "without", BLOCKS.replace("m.role == 'assistant'", "loop.first"))
    with raises(RecordError, "message 3 {% generation %}"):
        document(Chat(template=without))


CALLING = """{%- for m in messages %}
{{- '<' + m.role + '>' }}
{%- if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content.strip() + '</think>' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + call.function.arguments | tojson }}{% endfor %}
{{- '<end>' }}
{%- endfor %}{{ '<assistant>' if add_generation_prompt }}"""


def test_calls_and_reasoning_are_text_of_the_record(tmp_path):
    """Not of the template, whose special tokens it would be; reasoning may be a part of the content."""
    template = template_file(tmp_path, CALLING)
    call = {"function": {"name": "look", "arguments": {"<end>": ["a\n<end>", 2]}}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "<end>"},
        {"role": "assistant", "content": "<think>\n<end>?\n</think>\n\nSo."},
    ]
    (spans,) = Chat(template=template).to_documents({"messages": messages})
    assert in_loss(spans) == ['<call>look{"<end>": ["a\\n<end>", 2]}<end>', "<think><end>?</think>So.<end>"]
    assert message_texts(spans) == ["Hi", "look", "<end>", "a\\n<end>", "<end>", "<end>?", "So."]
    talk = [messages[0], *messages[2:], {"role": "user", "content": "Go on"}]
    prompt = ChatTemplate(template).to_prompt(talk)
    assert "think" not in text(prompt) and text(prompt).endswith("So.<end><user>Go on<end><assistant>")


def test_tools_that_look_like_a_placeholder_are_refused(tmp_path):
    template = template_file(tmp_path, "{{ tools | tojson }}" + CALLING)
    schema = {"name": '4f1c0e9d-7-"4f1c0e9d'}
    with raises(RecordError, "tools text"):
        Chat(template=template).to_documents(answer(content="Hi", tools=[schema]))


def test_gemma_refuses_turns_that_do_not_alternate():
    with raises(RecordError, "alternate"):
        document(Chat(template="gemma"), [("user", "Hi"), ("user", "Hi?"), ("assistant", "Hello.")])


def test_unusable_templates_are_refused_in_one_line(tmp_path):
    for name, content in (("list.json", "[]"), ("bad.json", "{"), ("bare.json", "{}")):
        (tmp_path / name).write_text(content)
    template_file(tmp_path, "{% for %}")
    for name in ("none.jinja", "chat_template.jinja", "list.json", "bad.json", "bare.json"):
        with raises(ConfigError, f"{tmp_path}/{name}: "):
            document(Chat(template=str(tmp_path / name)))
    with raises(ConfigError, "bos_token tokenizer_config.json"):
        document(Chat(template=template_file(tmp_path / "alone", LLAMA3)))


ASKED = [{"role": "user", "content": "2+2?"}]
GOOD, WORSE = [{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "5"}]
RENDERED = [
    ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n", ["4", "<|im_end|>"]),
    ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n", ["5", "<|im_end|>"]),
]


def shown(documents):
    return [
        ("".join(span.text for span in document), [span.text for span in document if span.in_loss])
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
    format = Preference()
    assert len(format.to_documents(record)) == format.documents_per_record
    assert shown(format.to_documents(record)) == RENDERED


def test_without_a_prompt_field_the_common_beginning_is_the_prompt():
    talk = [*ASKED, *GOOD, {"role": "user", "content": "And 3+3?"}]
    record = {"chosen": [*talk, {"role": "assistant", "content": "6"}], "rejected": [*talk, *GOOD]}
    (chosen, rejected) = shown(Preference(prompt=None).to_documents(record))
    assert (chosen[1], rejected[1]) == (["6", "<|im_end|>"], ["4", "<|im_end|>"])
    assert chosen[0].startswith(RENDERED[0][0]) and rejected[0].startswith(RENDERED[0][0])


def test_texts_are_joined_without_a_template():
    record = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    assert shown(Preference(template=None).to_documents(record)) == [("2+2=4", ["4"]), ("2+2=5", ["5"])]
    spans = [span for document in Preference(template=None).to_documents(record) for span in document]
    assert not any(span.from_template for span in spans)


def test_only_the_completion_counts_in_the_loss():
    assert shown(Completion().to_documents({"prompt": "2+2=", "completion": "4"})) == [("2+2=4", ["4"])]
    assert shown(Completion().to_documents({"prompt": "", "completion": "4"})) == [("4", ["4"])]
    format = Completion(completion="answer", template="chatml")
    for answer in ("4", GOOD):
        assert shown(format.to_documents({"prompt": "2+2?", "answer": answer})) == RENDERED[:1]


@pytest.mark.parametrize(
    ("format", "record", "named"),
    [
        (Preference(), {"prompt": "a", "chosen": "b"}, "rejected prompt, chosen"),
        (Preference(), {"prompt": "a", "chosen": "b", "rejected": 1}, "rejected int"),
        (Preference(), {"prompt": ASKED, "chosen": ASKED, "rejected": WORSE}, "chosen assistant"),
        (Preference(), {"prompt": "a", "chosen": " ", "rejected": "c"}, "message 1 of chosen"),
        (Preference(prompt=None), {"chosen": GOOD, "rejected": WORSE}, "different"),
        (Preference(prompt=None), {"chosen": ASKED + GOOD, "rejected": ASKED + GOOD}, "assistant"),
        (Preference(template=None), {"prompt": ASKED, "chosen": "b", "rejected": "c"}, "prompt list"),
        (Completion(), {"prompt": "a", "completion": ""}, "answer empty"),
        (Completion(), {"prompt": "a", "completion": None}, "completion NoneType"),
        (Labeled(), {"prompt": "a", "completion": "b"}, "label prompt, completion"),
        (Labeled(), {"prompt": "a", "completion": "b", "label": "yes"}, "label 'yes' true false"),
    ],
)
def test_records_without_answers_are_refused(format, record, named):
    with raises(RecordError, named):
        format.to_documents(record)


def test_formats_declare_masks_and_documents_per_record():
    documents = {Chat: (True, 1), Completion: (True, 1), Preference: (True, 2)}
    for format in (Chat(train_on="last"), Completion(), Preference(template=None)):
        assert (format.has_loss_mask, format.documents_per_record) == documents[type(format)]
        assert decode(type(format), encode(format)) == format
    assert set(documents) < set(AnyFormat.__args__)
