"""A prompt with one answer as a document, or with two as two: the chosen one, then the rejected one.

Only the answers are learned.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.documents.chat import messages_of
from jaxinfra.prepare.documents.chat_template import Templated, compiled
from jaxinfra.prepare.documents.document import Document, RecordError, Span, as_text, value_of
from jaxinfra.prepare.sources.record import Record


class _Answered(Templated[str | None]):
    """A prompt and its answers: texts, or lists of messages. `answers` are the fields of those."""

    prompt: Any
    answers: ClassVar[tuple[str, ...]]

    @override
    def documents(self, record: Record) -> Sequence[Document]:
        prompt = None if self.prompt is None else value_of(record, self.prompt)
        fields = [getattr(self, name) for name in self.answers]
        answers = [(value_of(record, field), field) for field in fields]
        if self.template is None:
            shown, texts = as_text(prompt, str(self.prompt)), [as_text(*answer) for answer in answers]
            if not all(texts):
                raise RecordError("the answer is empty")
            before = [Span(text=shown, learned=False)] if shown else []
            return [[*before, Span(text=text)] for text in texts]
        turns = [messages_of(*answer, role="assistant") for answer in answers]
        if self.prompt is None:  # it is what whole conversations begin with
            pairs = zip(*turns, strict=False)
            shared = [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
            if not shared:
                raise RecordError("the chosen and the rejected conversation begin with different messages")
        else:
            shared = messages_of(prompt, self.prompt, role="user")
        documents, start = [], len(shared)
        for answer, field in zip(turns, fields, strict=True):
            messages = answer if answer[:start] == shared else [*shared, *answer]
            learned = [number for number in range(start, len(messages)) if messages[number]["role"] == "assistant"]
            if not learned:
                raise RecordError(f"{field} has no message of the assistant after the prompt")
            documents.append(compiled(self.template).spans(messages, learned))
        return documents


@dataclass(frozen=True, kw_only=True)
class Preference(_Answered):
    """Fields of the record hold a prompt and two answers: texts, or lists of messages.

    Answers may be whole conversations: then they begin with the prompt, or there is no prompt and what they share is
    one.

    Attributes:
        prompt: its field; None where the answers are whole conversations.
        template: as in `Chat`, where a prompt that is a text is said by the user; None joins texts as they are.
    """

    group = 2
    answers = ("chosen", "rejected")
    prompt: NonEmpty | None = "prompt"
    chosen: NonEmpty = "chosen"
    rejected: NonEmpty = "rejected"
    template: str | None = "chatml"

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if self.template is None and self.prompt is None:
            message = "answers that are whole conversations need a template"
            fix = "use template=chatml or prompt=prompt"
            yield Problem(fields=("prompt", "template"), message=message, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Completion(_Answered):
    """Fields of the record hold a prompt and its answer, which alone is learned; `template` is as in `Preference`."""

    answers = ("completion",)
    prompt: NonEmpty = "prompt"
    completion: NonEmpty = "completion"
    template: str | None = None
