"""Conversations as documents, in which the answers count in the loss."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.documents.chat_template import Message, TemplateFormat, load_template
from jaxinfra.prepare.documents.document import Document, RecordError, get_field, require_str
from jaxinfra.prepare.sources.record import Fields

_ROLES = {role: role for role in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Chat(TemplateFormat[str]):
    """Formats a conversation: messages of `role` and `content`, or of `from` and `value` (ShareGPT).

    The roles human and gpt of ShareGPT are user and assistant. An empty system message is left out.

    Attributes:
        template: chatml, llama3 or gemma, or the path of a .jinja file or of a tokenizer_config.json.
        train_on: what counts in the loss: all answers with the token that ends each, the last answer, or all text.
        system: system message for conversations that have none.
    """

    field: NonEmpty = "messages"
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
        messages = parse_messages(get_field(record, self.field), self.field)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers and self.train_on != "all":
            raise RecordError(f"{self.field} has no assistant message to train on")
        in_loss = {"assistant": answers, "last": answers[-1:], "all": None}[self.train_on]
        return [load_template(self.template).to_spans(messages, in_loss)]


def parse_messages(value: object, field: str, role: str | None = None) -> list[Message]:
    """Returns the messages of a conversation, at least one; RecordError says what is wrong with it.

    Args:
        value: list of messages, or a string if `role` is given.
        field: name of the field, for the error.
        role: role of the one message that a string becomes.
    """
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
    for key in keys:
        if key not in item:
            raise RecordError(f"{name} has no {key}; it has {', '.join(map(str, item)) or 'nothing'}")
    given, content = (item[key] for key in keys)
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RecordError(f"{name} has the role {given}, expected one of {', '.join(_ROLES)}")
    content = require_str(content, f"the content of {name}")
    if not content.strip() and role != "system":
        raise RecordError(f"{name} is empty")
    return {"role": role, "content": content if content.strip() else ""}
