"""How a conversation is laid out as text: what the template writes, and where the messages go between it.

A layout depends on the roles of the messages alone, so it is made once for each sequence of roles. It keeps the words
of the template apart from those of the messages, which is what makes special tokens safe and answers learnable.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.chat_jinja import JinjaTemplate, is_file
from jaxinfra.prepare.documents.document import RecordError, Span

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Words of a template.

    Attributes:
        text: what it writes.
        ends: the message whose turn this ends, if it is what a model must say to end its turn.
    """

    text: str
    ends: int | None = None


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where the content of a message goes.

    Attributes:
        message: its number.
        strip_left: whether white space before it is taken away.
        strip_right: whether white space after it is.
    """

    message: int
    strip_left: bool = False
    strip_right: bool = False

    def fill(self, content: str) -> str:
        """The content as the template writes it."""
        content = content.lstrip() if self.strip_left else content
        return content.rstrip() if self.strip_right else content


Layout = Sequence[Fixed | Slot]


def spans(
    template: str, messages: Sequence[Message], learned: Collection[int], *, everything: bool = False
) -> list[Span]:
    """A conversation as spans.

    Args:
        template: the name of a preset, or the path of a file.
        messages: at least one.
        learned: the messages that are learned, each with what ends its turn.
        everything: whether all of the text is learned, that of the template too.

    Raises:
        RecordError: the template refuses the messages, or writes them otherwise than they are.
        ConfigError: the file of the template cannot be used.
    """
    roles = tuple(message.role for message in messages)
    layout = _layout(template, roles)
    parts = []
    for part in layout:
        if isinstance(part, Slot):
            text = part.fill(messages[part.message].content)
            parts.append(Span(text=text, learned=everything or part.message in learned))
        else:
            parts.append(Span(text=part.text, learned=everything or part.ends in learned, control=True))
    if is_file(template):
        written = _jinja(template).render([{"role": message.role, "content": message.content} for message in messages])
        if written != "".join(part.text for part in parts):
            raise RecordError(f"the template {template} rewrites its messages; use one that writes them as they are")
    return [part for part in parts if part.text]


def identity_of(template: str) -> str | None:
    """Hash of a template that is in a file, which is read anew; None for a preset.

    Raises:
        ConfigError: the file cannot be used.
    """
    if not is_file(template):
        return None
    _jinja.cache_clear()
    _layout.cache_clear()
    return _jinja(template).digest


def markers_of(template: str) -> Sequence[str]:
    """The special tokens that a template writes: of a file those that it uses by name, such as bos_token.

    Raises:
        ConfigError: the file cannot be used.
    """
    return _jinja(template).markers if is_file(template) else MARKERS[template]


@functools.lru_cache(maxsize=4096)
def _layout(template: str, roles: tuple[Role, ...]) -> Layout:
    if is_file(template):
        return _read(_jinja(template), template, roles)
    return tuple(PRESETS[template](roles))


@functools.lru_cache(maxsize=16)
def _jinja(path: str) -> JinjaTemplate:
    template = JinjaTemplate.load(path)
    if _begins_another(template):
        raise ConfigError(
            f"template={path}: begins another answer after the last message, so that it could be learned as the end "
            "of one; let it do so only if add_generation_prompt, or use a preset"
        )
    return template


def _chatml(roles: Sequence[Role]) -> Iterator[Fixed | Slot]:
    for number, role in enumerate(roles):
        yield Fixed(text=f"<|im_start|>{role}\n")
        yield Slot(message=number)
        yield Fixed(text="<|im_end|>", ends=number)
        yield Fixed(text="\n")


def _llama3(roles: Sequence[Role]) -> Iterator[Fixed | Slot]:
    yield Fixed(text="<|begin_of_text|>")
    for number, role in enumerate(roles):
        yield Fixed(text=f"<|start_header_id|>{role}<|end_header_id|>\n\n")
        yield Slot(message=number, strip_left=True, strip_right=True)
        yield Fixed(text="<|eot_id|>", ends=number)


def _gemma(roles: Sequence[Role]) -> Iterator[Fixed | Slot]:
    """Its turns alternate; what a system message says opens the first turn of the user."""
    first = 1 if roles[0] == "system" else 0
    yield Fixed(text="<bos>")
    for number, role in enumerate(roles[first:], first):
        expected = "user" if (number - first) % 2 == 0 else "assistant"
        if role != expected:
            raise RecordError(f"message {number + 1} is of the {role}, gemma expects the {expected} there")
        yield Fixed(text=f"<start_of_turn>{'model' if role == 'assistant' else role}\n")
        if first and number == first:
            yield Slot(message=0)
            yield Fixed(text="\n\n")
        yield Slot(message=number, strip_left=True, strip_right=True)
        yield Fixed(text="<end_of_turn>", ends=number)
        yield Fixed(text="\n")


PRESETS: dict[str, Callable[[Sequence[Role]], Iterator[Fixed | Slot]]] = {
    "chatml": _chatml,
    "llama3": _llama3,
    "gemma": _gemma,
}
"""ChatML (OpenAI 2023), and the templates that are published with Llama 3 and with Gemma 3."""

MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}
"""The special tokens that each of them writes."""


_BLANK = "\x0b"  # white space that no template writes
_MARK = "4f1c0e9d"  # a word that no template writes


def _read(template: JinjaTemplate, name: str, roles: Sequence[Role]) -> Layout:
    """The layout of a Jinja template, seen in what it writes around marked contents."""
    written = _marked(template, roles)
    places = []
    for number, role in enumerate(roles):
        mark = _mark(number)
        if written.count(mark) != 1:
            times = "leaves out" if mark not in written else "does not write once and as it is"
            raise RecordError(f"the template {name} {times} message {number + 1}, which is of the {role}")
        places.append((written.index(mark), number, mark))
    layout: list[Fixed | Slot] = []
    end = 0
    before: int | None = None
    for start, number, mark in sorted(places):
        stop = start + len(mark)
        kept_left, kept_right = written[start - 1 : start] == _BLANK, written[stop : stop + 1] == _BLANK
        layout += _turn_end(template, roles, before, written[end : start - kept_left])
        layout.append(Slot(message=number, strip_left=not kept_left, strip_right=not kept_right))
        end, before = stop + kept_right, number
    return [*layout, *_turn_end(template, roles, before, written[end:])]


def _turn_end(template: JinjaTemplate, roles: Sequence[Role], message: int | None, after: str) -> Iterator[Fixed]:
    """Cuts what is written after a message into what ends its turn, and the rest.

    What follows the last message of a conversation ends its turn, but for the white space at its end.
    """
    if message is None or roles[message] != "assistant":
        yield Fixed(text=after)
        return
    alone = _marked(template, roles[: message + 1])
    last = alone[alone.rindex(_mark(message)) + len(_mark(message)) :].removeprefix(_BLANK)
    shared = next((i for i, (a, b) in enumerate(zip(last, after, strict=False)) if a != b), min(len(last), len(after)))
    cut = len(after[:shared].rstrip()) or shared
    yield Fixed(text=after[:cut], ends=message)
    yield Fixed(text=after[cut:])


def _begins_another(template: JinjaTemplate) -> bool:
    """Whether a template ends a finished conversation as if another answer were to come.

    Then what follows an answer ends like what comes before one, and the next message of the user goes on otherwise.
    """
    try:
        ended = _marked(template, ("user", "assistant"))
        continued = _marked(template, ("user", "assistant", "user"))
    except RecordError:
        return False
    places = [ended.rfind(_mark(0)), ended.rfind(_mark(1))]
    if min(places) < 0:
        return False
    before = ended[places[0] + len(_mark(0)) : places[1]].strip()
    last = ended[places[1] + len(_mark(1)) :].strip()
    if not before or before[-1] != last[-1:]:
        return False
    return not continued[continued.rfind(_mark(1)) + len(_mark(1)) :].strip().startswith(last)


def _marked(template: JinjaTemplate, roles: Sequence[Role]) -> str:
    contents = (f"{_BLANK}{_mark(number)}{_BLANK}" for number in range(len(roles)))
    return template.render([{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)])


def _mark(number: int) -> str:
    return f"{_MARK}-{number}-{_MARK}"
