import itertools
import json
from dataclasses import replace

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.chat import Chat
from jaxinfra.prepare.documents.document import RecordError, Text

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
LEARNED = {
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


def document(form, talk=TALK):
    (spans,) = form.documents(record(talk))
    return list(spans)


def text(spans):
    return "".join(span.text for span in spans)


def learned(spans):
    """The runs of text that are learned."""
    return [text(run) for is_learned, run in itertools.groupby(spans, lambda span: span.learned) if is_learned]


def of_messages(spans):
    return [span.text for span in spans if not span.control]


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
def test_presets_write_what_their_models_were_trained_on(name):
    spans = document(Chat(template=name))
    assert text(spans) == EXPECTED[name]
    assert learned(spans) == LEARNED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_jinja_template_of_a_family_gives_the_spans_of_its_preset(name, file_of):
    for talk in (TALK, TALK[1:], TALK[1:2], TALK[1:3]):
        form, preset = Chat(template=file_of(name), learn="all"), Chat(template=name, learn="all")
        assert text(document(form, talk)) == text(document(preset, talk))
    by_file, by_name = (document(Chat(template=template)) for template in (file_of(name), name))
    assert learned(by_file) == learned(by_name)
    assert of_messages(by_file) == of_messages(by_name)


def test_jinja_itself_writes_the_same(file_of):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for name, source, bos in (
        ("llama3", LLAMA3, "<|begin_of_text|>"),
        ("gemma", GEMMA, "<bos>"),
        ("chatml", CHATML, ""),
    ):
        written = environment.from_string(source).render(**record(), bos_token=bos)
        assert written == EXPECTED[name] == text(document(Chat(template=file_of(name))))


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_message_spells_is_never_of_the_template(name, file_of):
    marks = "".join(("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<bos>", "{{ bos_token }}"))
    for template in (name, file_of(name)):
        spans = document(Chat(template=template), [("user", marks), ("assistant", marks)])
        assert of_messages(spans) == [marks, marks]
        assert not any(marks in span.text for span in spans if span.control)


def test_what_is_learned_is_chosen():
    answers = LEARNED["chatml"]
    assert learned(document(Chat(learn="last"))) == answers[1:]
    assert text(span for span in document(Chat(learn="all")) if span.learned) == EXPECTED["chatml"]
    assert learned(document(Chat(), [*TALK, ("user", "Still here?")])) == answers
    assert learned(document(Chat(learn="last"), [*TALK, ("user", "Still here?")])) == answers[1:]


def test_other_templates_are_cut_where_turns_end(file_of):
    talk = [("user", "Hi "), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "So long.")]
    spans = document(Chat(template=file_of("llama2")), talk)
    assert text(spans) == "<s>[INST] Hi [/INST] Hello. </s><s>[INST] Bye [/INST] So long. </s>"
    assert learned(spans) == [" Hello. </s>", " So long. </s>"]
    spans = document(Chat(template=file_of("plain")), talk)
    assert text(spans) == "Q: Hi \nA: Hello.\nQ: Bye\nA: So long.\n"
    assert learned(spans) == ["Hello.\n", "So long.\n"]


def test_a_template_comes_from_the_config_of_a_tokenizer(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"bos_token": "<|begin_of_text|>", "chat_template": LLAMA3}))
    assert text(document(Chat(template=str(path)))) == EXPECTED["llama3"]
    named = [{"name": "tool_use", "template": PLAIN}, {"name": "default", "template": CHATML}]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"chat_template": named}))
    assert text(document(Chat(template=str(other)))) == EXPECTED["chatml"]


def test_conversations_are_spelt_as_in_sharegpt_too():
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (spans,) = Chat(field="conversations").documents({"conversations": talk})
    assert text(spans) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"


def test_a_system_message_is_given_to_those_without():
    opened = "<|im_start|>system\nBe terse.<|im_end|>\n"
    form = Chat(system="Be terse.")
    assert text(document(form, TALK[1:])).startswith(opened)
    assert text(document(form)) == EXPECTED["chatml"]
    assert text(document(form, [("system", " "), *TALK[1:]])).startswith(opened)
    assert learned(document(form, TALK[1:])) == LEARNED["chatml"]


BAD_RECORDS = {
    "no field": ({"text": ""}, "messages.*text"),
    "a text": ({"messages": "Hi"}, "messages is str"),
    "nothing": ({"messages": None}, "messages is NoneType"),
    "no messages": ({"messages": []}, "messages"),
    "system alone": ({"messages": [{"role": "system", "content": ""}]}, "messages"),
    "no message": ({"messages": ["Hi"]}, "message 1 of messages is str"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 of messages has no content"),
    "role": (record([("user", "Hi"), ("tool", "x")]), "message 2 of messages .*tool.*system, user"),
    "role of a kind": ({"messages": [{"role": ["user"], "content": "x"}]}, r"\['user'\]"),
    "no text": (record([("user", ["Hi"])]), "message 1 of messages is list"),
    "half a pair": (record([("user", "a\ud83d")]), "surrogate pair at character 1"),
    "empty": (record([("user", "Hi"), ("assistant", " ")]), "message 2 of messages"),
    "no answer": (record([("user", "Hi")]), "no message of the assistant"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_records_that_are_no_conversation_are_refused_with_the_cause(case):
    bad, message = BAD_RECORDS[case]
    with pytest.raises(RecordError, match=message):
        Chat().documents(bad)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(RecordError, match="text has half a surrogate pair at character 2"):
        Text().documents({"text": "ab\udc00"})


@pytest.mark.parametrize(
    ("source", "talk", "message"),
    [
        (GEMMA, TALK[2:], "Conversation roles must alternate"),
        (
            "{{ messages[0]['content'] | upper }}{{ messages[1]['content'] }}",
            TALK[1:3],
            "does not write once|leaves out",
        ),
        ("{{ messages[1]['content'] }}", TALK[1:3], "leaves out message 1, which is of the user"),
        ("{% for m in messages * 2 %}{{ m['content'] }}{% endfor %}", TALK[1:3], "does not write once"),
        (
            PLAIN.replace("m['content']", "m['content'].replace('o', '0')"),
            TALK[1:3],
            "leaves out|rewrites its messages",
        ),
        (PLAIN.replace("m['content']", "m['content'].replace('H', 'h')"), TALK[1:3], "rewrites its messages"),
        (
            "{{ messages[0]['content'] }}{{ nothing.more }}",
            TALK[1:2],
            "'nothing' is undefined",
        ),
        ("{{ messages.append(1) }}", TALK[1:3], "refuses the conversation"),
    ],
)
def test_templates_that_refuse_or_rewrite_messages_are_refused(tmp_path, source, talk, message):
    with pytest.raises(RecordError, match=message):
        document(Chat(template=template_file(tmp_path, source, bos_token="<bos>"), learn="all"), talk)


ANSWERING = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"


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
def test_a_template_begins_and_ends_turns_in_its_own_way(tmp_path, source, expected):
    spans = document(Chat(template=template_file(tmp_path, source)), TALK[1:3])
    assert learned(spans) == [expected]


@pytest.mark.parametrize(
    ("source", "talk"),
    [
        (ANSWERING + "<assistant>", TALK[1:3]),
        (THINKING, TALK),
        ("{% for m in messages %}{{ m.content + ('\n' if not loop.last else '<end>') }}{% endfor %}", TALK[1:3]),
    ],
)
def test_where_beginnings_do_not_hold_blocks_are_asked_for(tmp_path, source, talk):
    with pytest.raises(RecordError, match=r"\{% generation %\}"):
        document(Chat(template=template_file(tmp_path, source)), talk)
    assert document(Chat(template=template_file(tmp_path, source), learn="all"), talk)


def test_generation_blocks_say_what_is_learned(tmp_path):
    form = Chat(template=template_file(tmp_path, BLOCKS))
    assert learned(document(form)) == ["Hello. \n<end>", "<think>So long.<end>"]
    assert learned(document(replace(form, learn="last"))) == ["<think>So long.<end>"]
    assert of_messages(document(form)) == [content.strip() for _, content in TALK]
    beside = BLOCKS.replace(
        "m.content }}<end>{% endgen", "m.content }}{% endgeneration %}{% generation %}<end>{% endgen"
    )
    assert learned(document(Chat(template=template_file(tmp_path / "beside", beside)))) == learned(document(form))
    without = template_file(tmp_path / "without", BLOCKS.replace("m.role == 'assistant'", "loop.first"))
    with pytest.raises(RecordError, match=r"message 3 in no \{% generation %\}"):
        document(Chat(template=without))


def test_gemma_wants_turns_to_alternate():
    with pytest.raises(RecordError, match="must alternate"):
        document(Chat(template="gemma"), [("user", "Hi"), ("user", "Hi?"), ("assistant", "Hello.")])


def test_unusable_templates_are_refused_in_one_line(tmp_path):
    cases = {
        str(tmp_path / "none.jinja"): r"none\.jinja: ",
        template_file(tmp_path, "{% for %}"): r"chat_template\.jinja: is not a template",
    }
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bare.json").write_text("{}")
    cases[str(tmp_path / "list.json")] = "list.json"
    cases[str(tmp_path / "bad.json")] = "bad.json"
    cases[str(tmp_path / "bare.json")] = r"bare\.json: .*\.jinja"
    for template, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            document(Chat(template=template))
    with pytest.raises(ConfigError, match=r"bos_token.*tokenizer_config\.json"):
        document(Chat(template=template_file(tmp_path / "alone", LLAMA3)))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Chat(field=""), "field=.*field=messages"),
        (Chat(template="alpaca"), "template=alpaca: .*template=chatml"),
        (Chat(system=" "), "system=.*system=none"),
    ],
)
def test_forms_say_what_is_wrong_with_them(form, message):
    with pytest.raises(ConfigError, match=message):
        validate(form)
