"""Record formats that a recipe may name: text, conversations, a prompt with an answer or a pair, answers with labels.

Of conversations and answers, only what the assistant writes counts in the loss.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.data.labeled import DESIRABLE, UNDESIRABLE
from jaxinfra.prepare.documents.chat_template import REASONING, Message, TemplateFormat, load_template
from jaxinfra.prepare.documents.document import Document, RecordError, Span, Text, get_field, require_str
from jaxinfra.prepare.sources.record import Fields
from jaxinfra.storage.errors import cause_of

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
_MESSAGE_FIELDS = (*REASONING, "tool_calls", "name", "tool_call_id")  # beside role and content
_TOOLS = "tools"  # the field of the schemas of functions, as in TRL


@dataclass(frozen=True, kw_only=True)
class Chat(TemplateFormat[str]):
    """Formats a conversation: messages of `role` and `content`, or of `from` and `value` (ShareGPT).

    Messages may have tool calls, results of tools (role `tool`) and reasoning, and the record the schemas of `tools`,
    where the template has a place for them.

    Attributes:
        field: field of the messages.
        template: chatml, llama3, gemma, or the path of a .jinja file or a tokenizer_config.json.
        train_on: what counts in the loss: "assistant" all answers with the token that ends each, "last" the last
            answer, "all" all text.
        system: system message for conversations that have none, or an empty one; None adds none.
    """

    field: NonEmptyStr = "messages"
    template: str = "chatml"
    train_on: Literal["assistant", "last", "all"] = "assistant"
    system: str | None = None

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if self.system is not None and not self.system.strip():
            yield Problem(fields=("system",), message="is blank", fix="use system=none")

    @override
    def to_documents(self, record: Fields) -> Sequence[Document]:
        messages = _parse_messages(get_field(record, self.field), self.field)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        answers = _answers(messages)
        if not answers and self.train_on != "all":
            raise RecordError(f"{self.field} has no assistant message to train on")
        in_loss = {"assistant": answers, "last": answers[-1:], "all": None}[self.train_on]
        return [load_template(self.template).to_spans(messages, in_loss, _parse_tools(record))]


class _PromptFormat(TemplateFormat[str | None]):
    """Formats a prompt and its answers; `answers` are the config fields that name the record's answers."""

    prompt: Any
    answers: ClassVar[tuple[str, ...]]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that are read."""
        return tuple(value for name, value in vars(self).items() if name != "template" and value is not None)

    @override
    def to_documents(self, record: Fields) -> Sequence[Document]:
        prompt = None if self.prompt is None else get_field(record, self.prompt)
        fields: list[str] = [getattr(self, name) for name in self.answers]
        answers = [get_field(record, field) for field in fields]
        if self.template is None:
            question = require_str(prompt, str(self.prompt))
            texts = [require_str(answer, field) for answer, field in zip(answers, fields, strict=True)]
            if not all(texts):
                raise RecordError("the answer is empty")
            question_spans = [Span(text=question, in_loss=False)] if question else []
            return [[*question_spans, Span(text=text)] for text in texts]
        conversations = [_parse_messages(*pair, "assistant") for pair in zip(answers, fields, strict=True)]
        if self.prompt is None:
            prompt_messages = _common_beginning(*conversations)
        else:
            prompt_messages = _parse_messages(prompt, self.prompt, "user")
        documents, start, tools = [], len(prompt_messages), _parse_tools(record)
        for messages, field in zip(conversations, fields, strict=True):
            if messages[:start] != prompt_messages:  # the answer does not repeat the prompt
                messages = [*prompt_messages, *messages]
            in_loss = _answers(messages, start)
            if not in_loss:
                raise RecordError(f"{field} has no assistant message after the prompt")
            documents.append(load_template(self.template).to_spans(messages, in_loss, tools))
        return documents


@dataclass(frozen=True, kw_only=True)
class Preference(_PromptFormat):
    """Formats a prompt, a chosen and a rejected answer: strings, or lists of messages, also with the prompt.

    Attributes:
        prompt: field of the prompt; None: the answers are conversations, whose common beginning is the prompt.
        chosen: field of the chosen answer.
        rejected: field of the rejected answer.
        template: chatml, llama3, gemma, or the path of a .jinja file or a tokenizer_config.json; a string prompt
            becomes a user message. None joins the strings.
    """

    kind = "pairs"
    documents_per_record = 2
    answers = ("chosen", "rejected")
    prompt: NonEmptyStr | None = "prompt"
    chosen: NonEmptyStr = "chosen"
    rejected: NonEmptyStr = "rejected"
    template: str | None = "chatml"

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if self.template is None and self.prompt is None:
            message = "answers that are whole conversations need a template"
            fix = "use template=chatml or prompt=prompt"
            yield Problem(fields=("prompt", "template"), message=message, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Completion(_PromptFormat):
    """Formats a prompt and its completion: strings, or lists of messages.

    Attributes:
        prompt: field of the prompt.
        completion: field of the completion.
        template: chatml, llama3, gemma, or the path of a .jinja file or a tokenizer_config.json; a string prompt
            becomes a user message. None joins the strings.
    """

    answers = ("completion",)
    prompt: NonEmptyStr = "prompt"
    completion: NonEmptyStr = "completion"
    template: str | None = None


@dataclass(frozen=True, kw_only=True)
class Labeled(_PromptFormat):
    """Formats a prompt and a completion that is desirable or not: strings, or lists of messages.

    Attributes:
        prompt: field of the prompt.
        completion: field of the completion.
        label: field that says whether the completion is desirable: true or false, 1 or 0.
        template: chatml, llama3, gemma, or the path of a .jinja file or a tokenizer_config.json; a string prompt
            becomes a user message. None joins the strings.
    """

    kind = "labeled"
    answers = ("completion",)
    prompt: NonEmptyStr = "prompt"
    completion: NonEmptyStr = "completion"
    label: NonEmptyStr = "label"
    template: str | None = "chatml"

    @override
    def to_documents(self, record: Fields) -> Sequence[Document]:
        label = get_field(record, self.label)
        if not isinstance(label, int) or label not in (0, 1):
            raise RecordError(f"{self.label} is {label!r}, expected true or false")
        in_loss = DESIRABLE if label else UNDESIRABLE
        (document,) = super().to_documents(record)
        return [[replace(span, in_loss=in_loss if span.in_loss else 0) for span in document]]


AnyFormat = Text | Chat | Completion | Preference | Labeled


def _common_beginning(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Returns the messages with which both conversations begin, at least one."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    messages = [message for message, _ in pairs]
    if not messages:
        raise RecordError("the chosen and the rejected conversation begin with different messages")
    return messages


def _answers(messages: Sequence[Message], start: int = 0) -> tuple[int, ...]:
    """Returns the indices of the assistant messages from `start` on."""
    return tuple(index for index in range(start, len(messages)) if messages[index]["role"] == "assistant")


def _parse_messages(value: object, field: str, role: str | None = None) -> list[Message]:
    """Returns one or more messages, without empty system messages; with `role`, a string is a message of this role."""
    if role is not None and isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError(f"{field} is {type(value).__name__}, expected a list of messages")
    messages = [_parse_message(item, f"message {number} of {field}") for number, item in enumerate(value, 1)]
    messages = [message for message in messages if message["content"] or message["role"] != "system"]
    if not messages:
        raise RecordError(f"{field} has no messages")
    return messages


def _parse_message(item: object, name: str) -> Message:
    if not isinstance(item, dict):
        raise RecordError(f"{name} is {type(item).__name__}, expected role and content")
    keys = ("from", "value") if "from" in item else ("role", "content")
    item = {"content": None, **item} if item.get("tool_calls") else item
    for key in keys:
        if key not in item:
            raise RecordError(f"{name} has no {key}; it has {', '.join(map(str, item)) or 'nothing'}")
    role_name, content = (item[key] for key in keys)
    role = _ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        raise RecordError(f"{name} has the role {role_name}, expected one of {', '.join(_ROLES)}")
    # Tables give a message the fields of all others, as null.
    more = {field: item[field] for field in _MESSAGE_FIELDS if item.get(field) is not None}
    calls = _parse_tool_calls(more.pop("tool_calls", []), name)
    content = require_str("" if content is None and calls else content, f"the content of {name}")
    if not content.strip() and role in ("user", "assistant") and not calls:
        raise RecordError(f"{name} is empty")
    texts = {field: require_str(text, f"the {field} of {name}") for field, text in more.items()}
    if "tool_call_id" in texts:
        _require_id(texts["tool_call_id"], name)
    message = {"role": role, "content": content if content.strip() else "", **texts}
    return message | {"tool_calls": calls} if calls else message


def _parse_tool_calls(value: object, name: str) -> list[dict[str, Any]]:
    """Returns calls with the name and the arguments of their `function`, which may be given without it."""
    form = "a list of calls with the name and the arguments of a function"
    if not isinstance(value, list):
        raise RecordError(f"tool_calls of {name} is {type(value).__name__}, expected {form}")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, dict) else None
        called = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(called, str) or not called.strip():
            raise RecordError(f"tool_calls of {name} has {_short(call)}, expected {form}")
        arguments = function.get("arguments")
        function = {"name": called, "arguments": {} if arguments is None else arguments}
        identity = {} if call.get("id") is None else {"id": _require_id(call["id"], f"a tool call of {name}")}
        calls.append({**identity, "type": "function", "function": _as_json(function, f"a tool call of {name}")})
    return calls


def _require_id(value: object, name: str) -> str:
    """Returns the id of a tool call, which templates write as their own text; RecordError if it may be more."""
    if not isinstance(value, str) or not re.fullmatch(r"[\w.:-]{1,100}", value):
        raise RecordError(f"{name} has the id {_short(value)}, expected letters, digits, - and _")
    return value


def _parse_tools(record: Fields) -> list[dict[str, Any]] | None:
    """Returns the schemas of functions that a record has, as a list or as its JSON."""
    value = record.get(_TOOLS)
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except ValueError as error:
            raise RecordError(f"{_TOOLS} is not JSON ({cause_of(error)})") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RecordError(f"{_TOOLS} is {_short(value)}, expected a list of JSON schemas of functions")
    return _as_json(value, _TOOLS)


def _as_json[T](value: T, name: str) -> T:
    """Returns `value`; RecordError if JSON cannot express it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{name} is not JSON ({cause_of(error)})") from None
    return value


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:60]} ..."
