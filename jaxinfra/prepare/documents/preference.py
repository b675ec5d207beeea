"""A prompt with one answer as one document, or with a chosen and a rejected answer as two.

Only the answers count in the loss.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.documents.chat import parse_messages
from jaxinfra.prepare.documents.chat_template import TemplateFormat, load_template
from jaxinfra.prepare.documents.document import Document, RecordError, Span, get_field, require_str
from jaxinfra.prepare.sources.record import Fields


class _PromptFormat(TemplateFormat[str | None]):
    """Formats a prompt and its answers: strings, or lists of messages.

    Attributes:
        answers: names of the config fields that name the record's answers.
    """

    prompt: Any
    answers: ClassVar[tuple[str, ...]]

    @override
    def to_documents(self, record: Fields) -> Sequence[Document]:
        prompt = None if self.prompt is None else get_field(record, self.prompt)
        fields = [getattr(self, name) for name in self.answers]
        answers = [(get_field(record, field), field) for field in fields]
        if self.template is None:
            question, texts = require_str(prompt, str(self.prompt)), [require_str(*answer) for answer in answers]
            if not all(texts):
                raise RecordError("the answer is empty")
            before = [Span(text=question, in_loss=False)] if question else []
            return [[*before, Span(text=text)] for text in texts]
        conversations = [parse_messages(*answer, role="assistant") for answer in answers]
        if self.prompt is None:  # the prompt is what both conversations begin with
            pairs = zip(*conversations, strict=False)
            shared = [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
            if not shared:
                raise RecordError("the chosen and the rejected conversation begin with different messages")
        else:
            shared = parse_messages(prompt, self.prompt, role="user")
        documents, start = [], len(shared)
        for answer, field in zip(conversations, fields, strict=True):
            messages = answer if answer[:start] == shared else [*shared, *answer]
            in_loss = [number for number in range(start, len(messages)) if messages[number]["role"] == "assistant"]
            if not in_loss:
                raise RecordError(f"{field} has no assistant message after the prompt")
            documents.append(load_template(self.template).to_spans(messages, in_loss))
        return documents


@dataclass(frozen=True, kw_only=True)
class Preference(_PromptFormat):
    """Formats a prompt, a chosen and a rejected answer: strings, or lists of messages.

    The answers may be whole conversations, which then begin with the prompt.

    Attributes:
        prompt: its field; None if the answers are whole conversations, whose common beginning is the prompt.
        template: as in `Chat`; a string prompt becomes a user message. None joins the strings.
    """

    documents_per_record = 2
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
class Completion(_PromptFormat):
    """Formats a prompt and its completion, which alone counts in the loss; `template` is as in `Preference`."""

    answers = ("completion",)
    prompt: NonEmpty = "prompt"
    completion: NonEmpty = "completion"
    template: str | None = None
