"""Two answers to one prompt as two documents: the chosen one, then the rejected one. Only the answers are learned."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxinfra.config import Problem
from jaxinfra.prepare.documents.chat import messages_of
from jaxinfra.prepare.documents.chat_template import Message, Templated, spans, template_problems
from jaxinfra.prepare.documents.document import Document, RecordError, Span, as_text, value_of
from jaxinfra.prepare.sources.record import Record


@dataclass(frozen=True, kw_only=True)
class Preference(Templated[str | None]):
    """Fields of the record hold a prompt and two answers: texts, or lists of messages.

    Answers may be whole conversations: then they begin with the prompt, or there is no prompt and what they share is
    one.

    Attributes:
        prompt: its field; None where the answers are whole conversations.
        chosen: field of the better answer.
        rejected: field of the worse answer.
        template: as in `Chat`, where a prompt that is a text is said by the user; None joins texts as they are.
    """

    masked: ClassVar[bool] = True
    group: ClassVar[int] = 2
    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    template: str | None = "chatml"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the form itself; files are not looked at."""
        for name in ("prompt", "chosen", "rejected"):
            if getattr(self, name) == "":
                yield Problem(fields=(name,), message="names no field", fix=f"use {name}={name}")
        if self.template is not None:
            yield from template_problems(self.template)
        elif self.prompt is None:
            yield Problem(
                fields=("prompt", "template"),
                message="answers that are whole conversations need a template",
                fix="use template=chatml or prompt=prompt",
            )

    def documents(self, record: Record) -> Sequence[Document]:
        """The chosen answer with its prompt, and the rejected one with it.

        Raises:
            RecordError: a field is not there or is no answer, or the template refuses it.
            ConfigError: the file of the template cannot be used.
        """
        prompt = None if self.prompt is None else value_of(record, self.prompt)
        answers = [(value_of(record, field), field) for field in (self.chosen, self.rejected)]
        if self.template is None:
            shown = as_text(prompt, str(self.prompt))
            return [answered_text(shown, as_text(answer, field)) for answer, field in answers]
        turns = [_turns(answer, field) for answer, field in answers]
        shared = _shared(*turns) if self.prompt is None else _turns(prompt, self.prompt, role="user")
        return [
            answered_turns(self.template, shared, answer, field)
            for answer, (_, field) in zip(turns, answers, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Completion(Templated[str | None]):
    """Fields of the record hold a prompt and its answer, which alone is learned: texts, or lists of messages.

    Attributes:
        prompt: its field.
        completion: field of the answer.
        template: as in `Chat`, where a prompt that is a text is said by the user; None joins texts as they are.
    """

    masked: ClassVar[bool] = True
    group: ClassVar[int] = 1
    prompt: str = "prompt"
    completion: str = "completion"
    template: str | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the form itself; files are not looked at."""
        for name in ("prompt", "completion"):
            if not getattr(self, name):
                yield Problem(fields=(name,), message="names no field", fix=f"use {name}={name}")
        if self.template is not None:
            yield from template_problems(self.template)

    def documents(self, record: Record) -> Sequence[Document]:
        """The prompt and its answer as one document.

        Raises:
            RecordError: a field is not there or is no answer, or the template refuses it.
            ConfigError: the file of the template cannot be used.
        """
        prompt, answer = value_of(record, self.prompt), value_of(record, self.completion)
        if self.template is None:
            return [answered_text(as_text(prompt, self.prompt), as_text(answer, self.completion))]
        shared, turns = _turns(prompt, self.prompt, role="user"), _turns(answer, self.completion)
        return [answered_turns(self.template, shared, turns, self.completion)]


def answered_text(prompt: str, answer: str) -> Document:
    """A text and its answer; the text is not learned.

    Raises:
        RecordError: the answer is empty.
    """
    if not answer:
        raise RecordError("the answer is empty")
    return [Span(text=text, learned=learned) for text, learned in ((prompt, False), (answer, True)) if text]


def answered_turns(template: str, prompt: Sequence[Message], answer: Sequence[Message], field: str) -> Document:
    """A conversation of which the assistant's messages after the prompt are learned.

    Args:
        template: as in `Chat`.
        prompt: at least one message.
        answer: what follows, or all of the conversation.
        field: where the answer is from.

    Raises:
        RecordError: nothing is answered, or the template refuses the conversation.
    """
    messages = answer if list(answer[: len(prompt)]) == list(prompt) else [*prompt, *answer]
    learned = [
        number for number, message in enumerate(messages) if number >= len(prompt) and message.role == "assistant"
    ]
    if not learned:
        raise RecordError(f"{field} has no message of the assistant after the prompt")
    return spans(template, messages, learned)


def _turns(value: Any, field: str, role: str = "assistant") -> list[Message]:
    """The messages of a field; a text is one of `role`."""
    return messages_of([{"role": role, "content": value}] if isinstance(value, str) else value, field)


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> Sequence[Message]:
    """What two conversations begin with.

    Raises:
        RecordError: they share nothing, or are the same.
    """
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    if not count:
        raise RecordError("the chosen and the rejected conversation begin with different messages")
    return chosen[:count]
