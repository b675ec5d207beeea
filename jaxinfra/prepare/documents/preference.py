"""A prompt with one answer as a document, or with two as two: the chosen one, then the rejected one.

Only the answers are learned.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, override

from jaxinfra.config import Problem
from jaxinfra.prepare.documents.chat import messages_of
from jaxinfra.prepare.documents.chat_template import Message, Templated, spans
from jaxinfra.prepare.documents.document import Document, RecordError, Span, as_text, value_of
from jaxinfra.prepare.sources.record import Record


class _Answered(Templated[str | None]):
    """A prompt and its answers: texts, or lists of messages. `named` is the field of the prompt, then the answers'."""

    prompt: Any

    @override
    def documents(self, record: Record) -> Sequence[Document]:
        fields = [getattr(self, name) for name in self.named[1:]]
        prompt = None if self.prompt is None else value_of(record, self.prompt)
        answers = [value_of(record, field) for field in fields]
        if self.template is None:
            shown = as_text(prompt, str(self.prompt))
            return [_text(shown, as_text(*answer)) for answer in zip(answers, fields, strict=True)]
        turns = [_turns(*answer) for answer in zip(answers, fields, strict=True)]
        shared = _shared(*turns) if self.prompt is None else _turns(prompt, self.prompt, role="user")
        return [_conversation(self.template, shared, *answer) for answer in zip(turns, fields, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Preference(_Answered):
    """Fields of the record hold a prompt and two answers: texts, or lists of messages.

    Answers may be whole conversations: then they begin with the prompt, or there is no prompt and what they share is
    one.

    Attributes:
        prompt: its field; None where the answers are whole conversations.
        chosen: field of the better answer.
        rejected: field of the worse answer.
        template: as in `Chat`, where a prompt that is a text is said by the user; None joins texts as they are.
    """

    group: ClassVar[int] = 2
    named: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")
    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    template: str | None = "chatml"

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if self.template is None and self.prompt is None:
            message, fix = (
                "answers that are whole conversations need a template",
                "use template=chatml or prompt=prompt",
            )
            yield Problem(fields=("prompt", "template"), message=message, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Completion(_Answered):
    """Fields of the record hold a prompt and its answer, which alone is learned: texts, or lists of messages.

    Attributes:
        prompt: its field.
        completion: field of the answer.
        template: as in `Chat`, where a prompt that is a text is said by the user; None joins texts as they are.
    """

    named: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    prompt: str = "prompt"
    completion: str = "completion"
    template: str | None = None


def _text(prompt: str, answer: str) -> Document:
    """Joins a text and its answer; the text is not learned."""
    if not answer:
        raise RecordError("the answer is empty")
    return [Span(text=text, learned=learned) for text, learned in ((prompt, False), (answer, True)) if text]


def _conversation(template: str, prompt: Sequence[Message], answer: Sequence[Message], field: str) -> Document:
    """Lays out a conversation of which the assistant's messages after the prompt are learned.

    Args:
        template: as in `Chat`.
        prompt: at least one message.
        answer: what follows, or all of the conversation.
        field: where the answer is from.
    """
    start = len(prompt)
    messages = answer if list(answer[:start]) == list(prompt) else [*prompt, *answer]
    learned = [number for number in range(start, len(messages)) if messages[number].role == "assistant"]
    if not learned:
        raise RecordError(f"{field} has no message of the assistant after the prompt")
    return spans(template, messages, learned)


def _turns(value: Any, field: str, role: str = "assistant") -> list[Message]:
    """Returns the messages of a field; a text is one of `role`."""
    return messages_of([{"role": role, "content": value}] if isinstance(value, str) else value, field)


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> Sequence[Message]:
    """Returns what two conversations begin with."""
    pairs = zip(chosen, rejected, strict=False)
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if not shared:
        raise RecordError("the chosen and the rejected conversation begin with different messages")
    return shared
