"""How a conversation is laid out as text: what its template writes, where the messages go, and what is learned.

A template is rendered with marks in place of messages, once for each sequence of roles. So its words stay apart from
those of the messages, which is what makes special tokens safe. What is learned of an answer is what is inside of the
template's `{% generation %}` blocks; a template that has none is rendered for each answer up to the message before it
and up to the answer itself, and the difference is learned (TRL, `SFTTrainer` with `assistant_only_loss`).
"""

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, override

from jaxinfra.config import Problem
from jaxinfra.prepare.documents.chat_jinja import BLOCK, PRESETS, JinjaTemplate, is_file, without_blocks
from jaxinfra.prepare.documents.document import Form, RecordError, Span

Role = Literal["system", "user", "assistant"]

_Range = tuple[int, int]
compiled = functools.lru_cache(maxsize=16)(JinjaTemplate.load)
"""The template of a preset or of a file."""
_MARK = "4f1c0e9d-{}-4f1c0e9d"  # a word that no template writes
_ADD_BLOCKS = "put {% generation %} and {% endgeneration %} around what the template writes of an answer"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


def spans(template: str, messages: Sequence[Message], learned: Sequence[int] | None) -> list[Span]:
    """Lays a conversation out as spans.

    Args:
        template: the name of a preset, or the path of a file.
        messages: at least one.
        learned: the messages of the assistant that are learned, in order, each with what ends its turn; None is all of
            the text, that of the template too.

    Raises:
        RecordError: the template refuses the messages, or writes them otherwise than they are.
        ConfigError: the file of the template cannot be used, or does not tell answers apart.
    """
    texts = [message.content.strip() for message in messages]
    around = tuple(tuple(message.content.split(text, 1)) for message, text in zip(messages, texts, strict=True))
    answers = None if learned is None else tuple(learned)
    layout = _layout(template, tuple(message.role for message in messages), around, answers)
    found = [
        Span(text=part if (control := isinstance(part, str)) else texts[part], learned=is_learned, control=control)
        for part, is_learned in layout
    ]
    if is_file(template):
        written = compiled(template).render([vars(message) for message in messages])
        if written != "".join(span.text for span in found):
            raise RecordError(f"the template {template} rewrites its messages; use one that writes them as they are")
    return found


class Templated[Name: (str, str | None)](Form):
    """A form that lays conversations out by a template, or by none."""

    template: Name

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if self.template is not None and self.template not in PRESETS and not is_file(self.template):
            message = f"is none of {', '.join(PRESETS)} and no .jinja or .json file"
            yield Problem(fields=("template",), message=message, fix="use template=chatml")

    @override
    def identity(self) -> str | None:
        if self.template is None or not is_file(self.template):
            return None
        compiled.cache_clear()
        _layout.cache_clear()
        return compiled(self.template).digest

    @override
    def markers(self) -> Sequence[str]:
        return () if self.template is None else compiled(self.template).markers


@functools.lru_cache(maxsize=4096)
def _layout(
    name: str, roles: tuple[Role, ...], around: tuple[tuple[str, ...], ...], answers: tuple[int, ...] | None
) -> Sequence[tuple[str | int, bool]]:
    """Lays out messages of these roles, with this white space around them; None as `answers` learns all.

    Returns:
        Words of the template and, in place of messages, their numbers, in order; each with whether it is learned.
        White space around messages counts as the template's.
    """
    template = compiled(name)
    talk = [
        {"role": role, "content": space[0] + _MARK.format(number) + space[-1]}
        for number, (role, space) in enumerate(zip(roles, around, strict=True))
    ]
    written = template.render(talk, blocks=True)
    places = []
    for number, role in enumerate(roles):
        mark = _MARK.format(number)
        if (times := written.count(mark)) != 1:
            cause = "does not write once and as it is" if times else "leaves out"
            raise RecordError(f"the template {name} {cause} message {number + 1}, which is of the {role}")
        places.append((written.index(mark), written.index(mark) + len(mark)))
    if answers is None:
        learned = [(0, len(written))]
    elif template.generates:
        learned = _generated(written, places, answers, name)
    else:
        learned = [_added(template, talk, written, places[number], number, name) for number in answers]
    return tuple(_parts(written, places, learned))


def _generated(written: str, places: Sequence[_Range], answers: Collection[int], name: str) -> list[_Range]:
    """The blocks that the answers are in, or that follow them."""
    blocks: dict[int, list[_Range]] = {}
    for block in BLOCK.finditer(written):
        inside = [number for number, (start, _) in enumerate(places) if block.start() < start < block.end()]
        before = [number for number, (start, _) in enumerate(places) if start < block.start()]
        for number in inside or before[-1:]:
            blocks.setdefault(number, []).append(block.span())
    for number in answers:
        if not any(start < places[number][0] < stop for start, stop in blocks.get(number, ())):
            raise RecordError(f"the template {name} has message {number + 1} in no {{% generation %}}; {_ADD_BLOCKS}")
    return [block for number in answers for block in blocks[number]]


def _added(
    template: JinjaTemplate, talk: list[dict[str, str]], written: str, place: _Range, number: int, name: str
) -> _Range:
    """What an answer adds to the conversation, from where a model begins to the end of its turn."""
    before, prompt = (template.render(talk[:number], answering=asked) if number else "" for asked in (False, True))
    after, next_turn = template.render(talk[: number + 1]), {"role": "user", "content": "4f1c0e9d"}
    goes_on = written if prompt != before else template.render([*talk[: number + 1], next_turn])
    if not (after.startswith(before) and written.startswith(after) and goes_on.startswith(after)):
        raise RecordError(
            f"the template {name} does not write message {number + 1} and what comes before it in the same way where "
            f"the conversation ends and where it goes on; {_ADD_BLOCKS}"
        )
    end = after[place[1] :]
    start = len(prompt) if prompt != before and after.startswith(prompt) else place[0]
    return start, place[1] + len(end.rstrip() or end)  # white space behind what ends a turn ends nothing


def _parts(written: str, places: Sequence[_Range], learned: Sequence[_Range]) -> Iterator[tuple[str | int, bool]]:
    """Cuts what a template wrote at messages, and where learning begins and ends."""
    numbers = {place: number for number, place in enumerate(places)}
    cuts = {0, len(written), *itertools.chain(*places, *learned)}
    for start, stop in itertools.pairwise(sorted(cuts)):
        part = numbers.get((start, stop), without_blocks(written[start:stop]))
        if part != "":
            yield part, any(first <= start and stop <= last for first, last in learned)
