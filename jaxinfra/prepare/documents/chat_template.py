"""How a conversation is laid out as text: what its template writes, where the messages go, and what is learned.

Templates are those of Jinja, as models are published with them. They run in the sandbox, with the names and filters
that the field gives them (Transformers, `apply_chat_template`). The day is not among them: the same record gives the
same document tomorrow.

A template is rendered with marks in place of messages, once for each sequence of roles. So its words stay apart from
those of the messages, which is what makes special tokens safe. What is learned of an answer is what is inside of the
template's `{% generation %}` blocks; a template that has none is rendered for each answer up to the message before it
and up to the answer itself, and the difference is learned (TRL, `SFTTrainer` with `assistant_only_loss`).
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import override

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.document import Form, RecordError, Span
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import file_exists, read_file

Message = dict[str, str]
"""One turn of a conversation: its `role`, which is system, user or assistant, and its `content`."""
_Range = tuple[int, int]
_CONFIG = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_MARKER = re.compile(r"<[^<>\s]+>")  # as presets spell special tokens
_MARK = "4f1c0e9d-{}-4f1c0e9d"  # a word that no template writes
_BEGIN, _END = "\U0010fffe", "\U0010ffff"  # noncharacters, which no text has, around generation blocks
_BLOCK = re.compile(f"{_BEGIN}[^{_BEGIN}]*?{_END}")
_WITHOUT_BLOCKS = str.maketrans("", "", _BEGIN + _END)
_ADD_BLOCKS = "put {% generation %} and {% endgeneration %} around what the template writes of an answer"


class ChatTemplate:
    """A template, compiled: a preset, or that of a .jinja or of a tokenizer_config.json.

    Attributes:
        digest: hash of its text and of the special tokens that it may use.
        markers: special tokens that it writes: of a file those that it uses by their names.
    """

    def __init__(self, name: str):
        """Reads and compiles it; a ConfigError says what is wrong with it."""
        self._name, self._from_file = name, _is_file(name)
        source, tokens = _read(name) if self._from_file else (PRESETS[name], {})
        environment = _environment()
        try:
            parsed = environment.parse(source)
            used = find_undeclared_variables(parsed)
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"template={name}: is not a template ({cause_of(error)})") from None
        if missing := sorted(used & set(_TOKENS) - tokens.keys()):
            raise ConfigError(f"template={name}: uses {missing[0]}; give the {_CONFIG} that defines it beside the file")
        self.digest = hashlib.sha256(json.dumps([source, tokens], sort_keys=True).encode()).hexdigest()
        by_name = [tokens[name] for name in sorted(used & tokens.keys())]
        self.markers = tuple(by_name if self._from_file else dict.fromkeys(_MARKER.findall(source)))
        self._has_blocks = any(isinstance(call.node, nodes.ExtensionAttribute) for call in parsed.find_all(nodes.Call))
        self._names = tokens | {"tools": None, "documents": None}
        self._layout = functools.lru_cache(maxsize=4096)(self._laid_out)

    def spans(self, messages: Sequence[Message], learned: Sequence[int] | None) -> list[Span]:
        """Lays a conversation of at least one message out, or raises a RecordError: the template does not allow it.

        `learned` are the messages of the assistant that are learned, in order, each with what ends its turn; None is
        all of the text, that of the template too.
        """
        roles, contents = zip(*((message["role"], message["content"]) for message in messages), strict=True)
        texts = [content.strip() for content in contents]
        around = tuple(tuple(content.split(text, 1)) for content, text in zip(contents, texts, strict=True))
        found = [
            Span(text=part if (control := isinstance(part, str)) else texts[part], learned=is_learned, control=control)
            for part, is_learned in self._layout(roles, around, None if learned is None else tuple(learned))
        ]
        if self._from_file and self._render(messages) != "".join(span.text for span in found):
            raise RecordError(f"the template {self._name} rewrites its messages; use one that writes them as they are")
        return found

    def _render(self, messages: Sequence[Message], *, answering: bool = False, blocks: bool = False) -> str:
        """Writes messages as text; an answer is to follow if `answering`, generation blocks stay marked if `blocks`."""
        try:
            text = self._template.render(messages=messages, add_generation_prompt=answering, **self._names)
        except TemplateError as error:
            raise RecordError(f"the template {self._name} refuses the conversation: {cause_of(error)}") from None
        return text if blocks else text.translate(_WITHOUT_BLOCKS)

    def _laid_out(
        self, roles: tuple[str, ...], around: tuple[tuple[str, ...], ...], answers: tuple[int, ...] | None
    ) -> Sequence[tuple[str | int, bool]]:
        """Lays out messages of these roles, with this white space around them; None as `answers` learns all.

        Words of the template, white space around messages among them, come in order with the numbers of the messages
        in their place; each with whether it is learned.
        """
        talk = [
            {"role": role, "content": space[0] + _MARK.format(number) + space[-1]}
            for number, (role, space) in enumerate(zip(roles, around, strict=True))
        ]
        written = self._render(talk, blocks=True)
        numbers: dict[_Range, int] = {}  # of messages, by where they are
        for number, role in enumerate(roles):
            mark = _MARK.format(number)
            if (times := written.count(mark)) != 1:
                cause = "does not write once and as it is" if times else "leaves out"
                raise RecordError(f"the template {self._name} {cause} message {number + 1}, which is of the {role}")
            numbers[written.index(mark), written.index(mark) + len(mark)] = number
        places = list(numbers)
        if answers is None:
            learned = [(0, len(written))]
        elif self._has_blocks:
            learned = self._blocks_of(answers, written, places)
        else:
            learned = [self._added(talk, written, places[number], number) for number in answers]
        parts = []
        for start, stop in itertools.pairwise(sorted({0, len(written), *itertools.chain(*places, *learned)})):
            part = numbers.get((start, stop), written[start:stop].translate(_WITHOUT_BLOCKS))
            if part != "":
                parts.append((part, any(first <= start and stop <= last for first, last in learned)))
        return parts

    def _blocks_of(self, answers: Sequence[int], written: str, places: Sequence[_Range]) -> list[_Range]:
        """Returns the blocks that the answers are in, or that follow them."""
        blocks: dict[int, list[_Range]] = {}
        for block in _BLOCK.finditer(written):
            inside = [number for number, (start, _) in enumerate(places) if block.start() < start < block.end()]
            before = [number for number, (start, _) in enumerate(places) if start < block.start()]
            for number in inside or before[-1:]:
                blocks.setdefault(number, []).append(block.span())
        for number in answers:
            if not any(start < places[number][0] < stop for start, stop in blocks.get(number, ())):
                cause = f"has message {number + 1} in no {{% generation %}}"
                raise RecordError(f"the template {self._name} {cause}; {_ADD_BLOCKS}")
        return [block for number in answers for block in blocks[number]]

    def _added(self, talk: list[Message], written: str, place: _Range, number: int) -> _Range:
        """Returns what an answer adds to the conversation, from where a model begins to the end of its turn."""
        before, prompt = (self._render(talk[:number], answering=asked) if number else "" for asked in (False, True))
        after, next_turn = self._render(talk[: number + 1]), {"role": "user", "content": "4f1c0e9d"}
        goes_on = written if prompt != before else self._render([*talk[: number + 1], next_turn])
        if not (after.startswith(before) and written.startswith(after) and goes_on.startswith(after)):
            raise RecordError(
                f"the template {self._name} does not write message {number + 1} and what comes before it in the same "
                f"way where the conversation ends and where it goes on; {_ADD_BLOCKS}"
            )
        end = after[place[1] :]
        start = len(prompt) if prompt != before and after.startswith(prompt) else place[0]
        return start, place[1] + len(end.rstrip() or end)  # white space behind what ends a turn ends nothing


compiled = functools.lru_cache(maxsize=16)(ChatTemplate)
"""The template of a preset or of a file."""


class Templated[Name: (str, str | None)](Form):
    """A form that lays conversations out by a template, or by none."""

    template: Name

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the form itself; files are not looked at."""
        if self.template is not None and self.template not in PRESETS and not _is_file(self.template):
            message = f"is none of {', '.join(PRESETS)} and no .jinja or .json file"
            yield Problem(fields=("template",), message=message, fix="use template=chatml")

    @override
    def identity(self) -> str | None:
        if self.template is None or not _is_file(self.template):
            return None
        compiled.cache_clear()
        return compiled(self.template).digest

    @override
    def markers(self) -> Sequence[str]:
        return () if self.template is None else compiled(self.template).markers


def _is_file(template: str) -> bool:
    return template.endswith((".jinja", ".jinja2", ".json"))


def _read(name: str) -> tuple[str, dict[str, str]]:
    """Reads the template of a file, of several the one called default, and the special tokens of the config with it."""
    is_config = name.endswith(".json")
    path = name if is_config else "".join((*name.rpartition("/")[:2], _CONFIG))
    config = {}
    if is_config or file_exists(path):
        try:
            config = json.loads(read_file(path, "a template"))
        except ValueError as error:
            raise ConfigError(f"template={path}: is not JSON ({cause_of(error)}); give a {_CONFIG}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"template={path}: is not a {_CONFIG}, which holds named values")
    found = config.get("chat_template") if is_config else read_file(name, "a template").decode(errors="replace")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if not isinstance(found, str):
        raise ConfigError(f"template={path}: has no chat_template; give the .jinja file that came with it")
    tokens = {token: config.get(token) for token in _TOKENS}
    texts = {token: text.get("content") if isinstance(text, dict) else text for token, text in tokens.items()}
    return found, {token: text for token, text in texts.items() if isinstance(text, str)}


class _Generation(Extension):
    """`{% generation %}` marks what the assistant writes, as in Transformers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _environment() -> Environment:
    """Makes the sandbox of Transformers (`utils/chat_template_utils.py`), without the date."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment


PRESETS = {
    "chatml": """
{%- for m in messages -%}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}""",
    "llama3": """<|begin_of_text|>
{%- for m in messages -%}
    {{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}""",
    "gemma": """<bos>
{%- set first = 1 if messages[0].role == 'system' else 0 -%}
{%- for m in messages[first:] -%}
    {%- if m.role != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{ raise_exception('turns of the user and the assistant must alternate') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}
    {{- messages[0].content + '\n\n' if first and loop.first }}
    {{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{{ '<start_of_turn>model\n' if add_generation_prompt }}""",
}
"""ChatML (OpenAI 2023), and the layouts of the templates that are published with Llama 3 and with Gemma 3."""
