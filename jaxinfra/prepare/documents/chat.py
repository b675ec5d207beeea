"""Conversations as documents, of which the answers are learned."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, override

from jaxinfra.config import Problem
from jaxinfra.prepare.documents.chat_template import Message, Role, Templated, spans
from jaxinfra.prepare.documents.document import Document, RecordError, as_text, value_of
from jaxinfra.prepare.sources.record import Record

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES |= {"human": "user", "gpt": "assistant"}  # of ShareGPT


@dataclass(frozen=True, kw_only=True)
class Chat(Templated[str]):
    """A field of the record holds a conversation: messages of `role` and `content`, or of `from` and `value`.

    The second spelling is that of ShareGPT, whose roles are human and gpt. A system message without text counts as
    none.

    Attributes:
        field: its name.
        template: chatml, llama3 or gemma, or the path of a .jinja file or of a tokenizer_config.json.
        learn: the answers of the assistant with what ends their turns, the last of them alone, or all of the text.
        system: text of a system message for conversations that have none.
    """

    named: ClassVar[tuple[str, ...]] = ("field",)
    field: str = "messages"
    template: str = "chatml"
    learn: Literal["assistant", "last", "all"] = "assistant"
    system: str | None = None

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if self.system is not None and not self.system.strip():
            yield Problem(fields=("system",), message="says nothing", fix="use system=none")

    @override
    def documents(self, record: Record) -> Sequence[Document]:
        messages = messages_of(value_of(record, self.field), self.field)
        if self.system is not None and messages[0].role != "system":
            messages = [Message(role="system", content=self.system), *messages]
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if not answers and self.learn != "all":
            raise RecordError(f"{self.field} has no message of the assistant to learn from")
        learned = {"assistant": answers, "last": answers[-1:], "all": None}[self.learn]
        return [spans(self.template, messages, learned)]


def messages_of(value: Any, field: str) -> list[Message]:
    """Returns the messages of a conversation, at least one, or raises a RecordError that says what is wrong with it."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError(f"{field} is {type(value).__name__}, expected a list of messages")
    messages = [_message(item, f"message {number} of {field}") for number, item in enumerate(value, 1)]
    messages = [message for message in messages if message.content or message.role != "system"]
    if not messages:
        raise RecordError(f"{field} has no messages")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RecordError(f"{where} is {type(item).__name__}, expected role and content")
    role_name, content_name = ("from", "value") if "from" in item else ("role", "content")
    for name in (role_name, content_name):
        if name not in item:
            raise RecordError(f"{where} has no {name}; it has {', '.join(map(str, item)) or 'nothing'}")
    role = _ROLES.get(item[role_name]) if isinstance(item[role_name], str) else None
    if role is None:
        raise RecordError(f"{where} is of the role {item[role_name]}, known are {', '.join(_ROLES)}")
    content = as_text(item[content_name], f"the content of {where}")
    if not content.strip() and role != "system":
        raise RecordError(f"{where} is empty")
    return Message(role=role, content=content if content.strip() else "")
