"""Conversations as documents, of which the answers are learned."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.documents.chat_template import Message, Templated, compiled
from jaxinfra.prepare.documents.document import Document, RecordError, as_text, value_of
from jaxinfra.prepare.sources.record import Record

_ROLES = {role: role for role in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Chat(Templated[str]):
    """A field of the record holds a conversation: messages of `role` and `content`, or of `from` and `value`.

    The second spelling is that of ShareGPT, whose roles are human and gpt. A system message without text counts as
    none.

    Attributes:
        template: chatml, llama3 or gemma, or the path of a .jinja file or of a tokenizer_config.json.
        learn: the answers of the assistant with what ends their turns, the last of them alone, or all of the text.
        system: text of a system message for conversations that have none.
    """

    field: NonEmpty = "messages"
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
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers and self.learn != "all":
            raise RecordError(f"{self.field} has no message of the assistant to learn from")
        learned = {"assistant": answers, "last": answers[-1:], "all": None}[self.learn]
        return [compiled(self.template).spans(messages, learned)]


def messages_of(value: Any, field: str, role: str | None = None) -> list[Message]:
    """Returns the messages of a conversation, at least one, or raises a RecordError that says what is wrong with it.

    A text is one message of `role`, if that is given.
    """
    if role is not None and isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError(f"{field} is {type(value).__name__}, expected a list of messages")
    messages = [_message(item, f"message {number} of {field}") for number, item in enumerate(value, 1)]
    messages = [message for message in messages if message["content"] or message["role"] != "system"]
    if not messages:
        raise RecordError(f"{field} has no messages")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RecordError(f"{where} is {type(item).__name__}, expected role and content")
    names = ("from", "value") if "from" in item else ("role", "content")
    for name in names:
        if name not in item:
            raise RecordError(f"{where} has no {name}; it has {', '.join(map(str, item)) or 'nothing'}")
    spelt, content = (item[name] for name in names)
    role = _ROLES.get(spelt) if isinstance(spelt, str) else None
    if role is None:
        raise RecordError(f"{where} is of the role {spelt}, known are {', '.join(_ROLES)}")
    content = as_text(content, f"the content of {where}")
    if not content.strip() and role != "system":
        raise RecordError(f"{where} is empty")
    return {"role": role, "content": content if content.strip() else ""}
