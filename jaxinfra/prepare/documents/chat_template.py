"""Renders conversations with Jinja chat templates, and finds the text that counts in the loss.

Templates run in Jinja's sandbox with the names and filters that `apply_chat_template` of Transformers gives them. The
date is left out, because a record must always give the same document.

A template is rendered with placeholders instead of the texts of the messages, once per sequence of roles and tool
calls. This separates template text, which is tokenized with special tokens, from the texts of a record, which are not.
Schemas of tools are template text. What a template writes inside of `{% generation %}` blocks counts in the loss. A
template without such blocks is rendered twice, up to the message before an answer and up to the answer, and the
difference counts (TRL, `SFTTrainer` with `assistant_only_loss`).
"""

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, override

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.document import RecordError, RecordFormat, Span
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import file_exists, read_file

Message = dict[str, Any]
"""One turn of a conversation: `role`, which is system, user, assistant or tool, and `content`.

An answer may have its reasoning in a field of `REASONING`, and `tool_calls`, each with the `name` and the `arguments`
of its `function`; then its content may be empty.
"""
Tools = Sequence[Mapping[str, Any]] | None
"""The JSON schemas of the functions that an answer may call."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The fields that templates read the reasoning of an answer from."""

_Range = tuple[int, int]  # start and end in the rendered text
_CONFIG_FILE = "tokenizer_config.json"
_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>")  # the form that they have in the presets
_PLACEHOLDER = '4f1c0e9d-{}-"4f1c0e9d'  # text that no template writes; JSON escapes its quote
_WRITTEN = re.compile(_PLACEHOLDER.replace("{}", r"(\d+)").replace('"', r'(\\?)"'))
_INLINE_REASONING = re.compile(r"\s*<think>(.*?\S.*?)</think>\n*(.*\S.*)", re.DOTALL)
_BLOCK_START, _BLOCK_END = "\U0010fffe", "\U0010ffff"  # noncharacters, which no text has, mark generation blocks
_BLOCK = re.compile(f"{_BLOCK_START}[^{_BLOCK_START}]*?{_BLOCK_END}")
_REMOVE_MARKS = str.maketrans("", "", _BLOCK_START + _BLOCK_END)
_TODAY = "strftime_now"  # the function of Transformers that gives a template the date
_LAST_END = "\ufdd0"  # a noncharacter marks where the last message ends
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # of what it computes
_ADD_BLOCKS = "put {% generation %} and {% endgeneration %} around what the template writes of an answer"


class _Hidden(NamedTuple):
    """A text of a record that a placeholder stands for."""

    text: str
    message: int  # its index
    field: str  # content, name, tool_calls, or one of REASONING


class _Written(NamedTuple):
    """A place where a template writes a hidden text."""

    number: int  # of the hidden text
    as_json: bool  # whether it is escaped as in a JSON string

    def text(self, hidden: Sequence[_Hidden]) -> str:
        text = hidden[self.number].text
        return json.dumps(text, ensure_ascii=False)[1:-1] if self.as_json else text


class ChatTemplate:
    """A compiled chat template, with its `source`, its `digest` and the `special_tokens` that it writes."""

    def __init__(self, name: str):
        """Reads and compiles a preset, a .jinja file or a tokenizer_config.json; ConfigError if it cannot be used."""
        self._name, self._from_file = name, _is_file(name)
        source, tokens = _read(name) if self._from_file else (PRESETS[name], {})
        self.source = source
        environment = _jinja_environment()
        try:
            parsed = environment.parse(source)
            used = find_undeclared_variables(parsed)
            self._template = environment.from_string(source)
        except TemplateError as error:
            cause = f"is not a Jinja template ({cause_of(error)})"
            raise ConfigError(f"template={name}: {cause}; use template=chatml") from None
        if missing := sorted(used & set(_TOKEN_NAMES) - tokens.keys()):
            raise ConfigError(f"template={name}: uses {missing[0]}; put the {_CONFIG_FILE} that defines it beside it")
        self.digest = hashlib.sha256(json.dumps([source, tokens], sort_keys=True).encode()).hexdigest()
        if self._from_file:  # special tokens that it does not use by name cannot be recognized
            self.special_tokens = tuple(tokens[token_name] for token_name in sorted(used & tokens.keys()))
        else:
            self.special_tokens = tuple(dict.fromkeys(_SPECIAL_TOKEN.findall(source)))  # without repetitions
        # `_Generation` turns each generation block into a call of itself.
        self._has_blocks = any(isinstance(call.node, nodes.ExtensionAttribute) for call in parsed.find_all(nodes.Call))
        self._knows_tools, self._knows_reasoning = "tools" in used, REASONING[0] in source
        self._variables = tokens | {"documents": None}
        self._segments = functools.lru_cache(maxsize=4096)(self._find_segments)

    def to_spans(self, messages: Sequence[Message], in_loss: tuple[int, ...] | None, tools: Tools = None) -> list[Span]:
        """Renders a conversation of at least one message; RecordError if the template refuses or rewrites it.

        `in_loss` has the indices of the assistant messages that count in the loss, each with the end of its turn. None
        counts all text, including the template's.
        """
        if tools and not self._knows_tools:
            fix = "use one that has, or records without tools"
            raise RecordError(f"the template {self._name} has no place for the schemas of tools; {fix}")
        messages = self._with_reasoning(messages)
        outline, hidden = _hide_texts(messages)
        owners = tuple((text.message, text.field) for text in hidden)
        spans = []
        for segment, is_in_loss in self._segments(json.dumps([outline, tools]), owners, in_loss):
            from_template = isinstance(segment, str)
            text = segment if from_template else segment.text(hidden)
            spans.append(Span(text=text, in_loss=is_in_loss, from_template=from_template))
        # A template may depend on the content of messages, which the placeholders cannot show; the presets do not.
        if self._from_file and self._render(messages, tools) != "".join(span.text for span in spans):
            raise RecordError(f"the template {self._name} rewrites messages; use one that writes them unchanged")
        return spans

    def to_prompt(self, messages: Sequence[Message]) -> list[Span]:
        """Renders a conversation up to where the next answer begins; RecordError as in `to_spans`."""
        outline, hidden = _hide_texts(self._with_reasoning(messages))
        rendered = self._render(outline, prompt=True)
        self._check_written(outline, [(text.message, text.field) for text in hidden], rendered)
        spans, end = [], 0
        for match in _WRITTEN.finditer(rendered):
            spans.append(Span(text=rendered[end : match.start()], from_template=True))
            spans.append(Span(text=_written(match).text(hidden)))
            end = match.end()
        return [span for span in [*spans, Span(text=rendered[end:], from_template=True)] if span.text]

    def to_text(self, messages: Sequence[Message], *, continues: bool = False) -> str:
        """Renders a conversation up to where the next answer begins, as `apply_chat_template` of Transformers.

        If it `continues`, the last message is the beginning of the answer. Raises RecordError if the template refuses.
        """
        if not continues:
            return self._render(messages, prompt=True)
        last = messages[-1]
        marked = [*messages[:-1], last | {"content": f"{last['content']}{_LAST_END} "}]
        text, mark, after = self._render(marked).rpartition(_LAST_END)
        if not mark:
            raise RecordError(f"the template {self._name} leaves out the beginning of the answer")
        return text if after.startswith(" ") else text.rstrip()  # it strips messages

    def _with_reasoning(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Gives reasoning that answers begin with, between <think> and </think>, a field of its own, if it is read."""
        if not self._knows_reasoning:
            return messages
        return [
            {**message, REASONING[0]: found[1], "content": found[2]}
            if message["role"] == "assistant"
            and message.keys().isdisjoint(REASONING)
            and (found := _INLINE_REASONING.fullmatch(message["content"]))
            else message
            for message in messages
        ]

    def _render(
        self, messages: Sequence[Message], tools: Tools = None, *, prompt: bool = False, keep_marks: bool = False
    ) -> str:
        """Renders messages; `prompt` adds the beginning of an answer, `keep_marks` keeps marks of generation blocks."""
        try:
            text = self._template.render(
                messages=messages, tools=tools, add_generation_prompt=prompt, **self._variables
            )
        except (TemplateError, *_TEMPLATE_FAULTS) as error:
            cause = cause_of(error)
            if _TODAY in cause:
                cause = f"writes the date of today; replace {_TODAY}(...) in a copy of it by a date in quotes"
                raise RecordError(f"the template {self._name} {cause}") from None
            raise RecordError(f"the template {self._name} refuses the conversation: {cause}") from None
        return text if keep_marks else text.translate(_REMOVE_MARKS)

    def _check_written(self, messages: Sequence[Message], owners: Sequence[tuple[int, str]], rendered: str) -> None:
        """Raises RecordError if the template leaves hidden texts out, or writes the content of a message twice.

        Reasoning may be left out, as many templates do with that of earlier turns.
        """
        times = Counter(int(match[1]) for match in _WRITTEN.finditer(rendered))
        if max(times, default=-1) >= len(owners):
            raise RecordError(f"tools have the text {_PLACEHOLDER.format(max(times))}, which stands for others here")
        for number, (index, field) in enumerate(owners):
            of = f"message {index + 1}, of role {messages[index]['role']}"
            if field == "content" and times[number] != 1:
                cause = "does not write exactly once and unchanged" if times[number] else "leaves out"
                raise RecordError(f"the template {self._name} {cause} {of}")
            if field == "tool_calls" and not times[number]:
                raise RecordError(f"the template {self._name} leaves out a tool call of {of}")

    def _find_segments(
        self, outline: str, owners: tuple[tuple[int, str], ...], answers: tuple[int, ...] | None
    ) -> Sequence[tuple[str | _Written, bool]]:
        """Returns template text (str) and hidden texts in order, each with whether it counts in the loss.

        `outline` has the messages with placeholders and the tools, as JSON; `owners` the index of the message and the
        field of each placeholder. A user message and an answer may give [("<user>", False), (text 0, False),
        ("<end><assistant>", False), (text 1, True), ("<end>", True)].
        """
        messages, tools = json.loads(outline)
        rendered = self._render(messages, tools, keep_marks=True)
        self._check_written(messages, owners, rendered)
        written = {match.span(): _written(match) for match in _WRITTEN.finditer(rendered)}
        first: dict[int, _Range] = {}  # where each text is written first
        for place, text in written.items():
            first.setdefault(text.number, place)
        ranges: dict[int, _Range] = {}  # from the first text of a message to its last one
        for number, (index, _) in enumerate(owners):
            if number in first:
                start, end = ranges.get(index, first[number])
                ranges[index] = min(start, first[number][0]), max(end, first[number][1])
        reasoning = {number: field for number, (_, field) in enumerate(owners) if field in REASONING}
        if reasoning and first.keys().isdisjoint(reasoning):
            cause = f"leaves out the {min(reasoning.values())} of all messages"
            raise RecordError(f"the template {self._name} {cause}; use one that reads it")
        if answers is None:
            loss_ranges = [(0, len(rendered))]
        elif self._has_blocks:
            loss_ranges = self._generation_blocks(answers, rendered, ranges)
        else:
            loss_ranges = [self._answer_range(messages, tools, rendered, ranges[index], index) for index in answers]
        segments = []
        bounds = sorted({0, len(rendered), *itertools.chain(*written, *loss_ranges)})
        for start, end in itertools.pairwise(bounds):
            in_loss = any(first <= start and end <= last for first, last in loss_ranges)
            if (start, end) in written:
                segments.append((written[start, end], in_loss))
            elif text := rendered[start:end].translate(_REMOVE_MARKS):
                segments.append((text, in_loss))
        return segments

    def _generation_blocks(self, answers: Sequence[int], rendered: str, ranges: Mapping[int, _Range]) -> list[_Range]:
        """Returns the generation blocks that hold the answers, and blocks behind them, such as the end of a turn."""
        starts = {index: start for index, (start, _) in ranges.items()}
        blocks: dict[int, list[_Range]] = {}  # by index of message
        for block in _BLOCK.finditer(rendered):
            inside = [index for index, start in starts.items() if block.start() < start < block.end()]
            before = [index for index, start in starts.items() if start < block.start()]
            for index in inside or before[-1:]:  # a block without a message belongs to the one before it
                blocks.setdefault(index, []).append(block.span())
        for index in answers:
            if not any(first < starts[index] < last for first, last in blocks.get(index, ())):
                cause = f"writes message {index + 1} outside of {{% generation %}} blocks"
                raise RecordError(f"the template {self._name} {cause}; {_ADD_BLOCKS}")
        return [block for index in answers for block in blocks[index]]

    def _answer_range(
        self, messages: list[Message], tools: Tools, rendered: str, content: _Range, index: int
    ) -> _Range:
        """Returns the range of `rendered` from the end of the generation prompt to the end of the answer's turn.

        `content` is the range of the answer itself, message number `index`. The conversation is rendered up to three
        places, and the text after `prompted` up to the end of `after` counts, here "Hello.<end>":

            before     <user>Hi<end>
            prompted   <user>Hi<end><assistant>
            after      <user>Hi<end><assistant>Hello.<end>
        """
        before = self._render(messages[:index], tools) if index else ""
        prompted = self._render(messages[:index], tools, prompt=True) if index else ""
        after = self._render(messages[: index + 1], tools)
        has_prompt = prompted != before
        longer = rendered
        if not has_prompt:  # the answer may be the last message, so `rendered` would not show how the text goes on
            longer = self._render([*messages[: index + 1], {"role": "user", "content": "Go on."}], tools)
        if not (after.startswith(before) and rendered.startswith(after) and longer.startswith(after)):
            raise RecordError(
                f"the template {self._name} writes message {index + 1} or what comes before it differently if the "
                f"conversation goes on; {_ADD_BLOCKS}"
            )
        content_start, content_end = content
        start = len(prompted) if has_prompt and after.startswith(prompted) else content_start
        turn_end = after[content_end:]  # such as "<|im_end|>\n", whose white space does not count
        return start, content_end + len(turn_end.rstrip() or turn_end)


load_template = functools.lru_cache(maxsize=16)(ChatTemplate)
"""Loads the template of a preset or of a file."""


class TemplateFormat[Name: (str, str | None)](RecordFormat):
    """A format that renders conversations with a template; None joins the texts instead."""

    template: Name

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the fields; does not read the file."""
        if self.template is not None and self.template not in PRESETS and not _is_file(self.template):
            message = f"must be {', '.join(PRESETS)}, or the path of a .jinja or .json file"
            yield Problem(fields=("template",), message=message, fix="use template=chatml")

    @override
    def template_digest(self) -> str | None:
        if self.template is None or not _is_file(self.template):
            return None
        load_template.cache_clear()  # the file may have changed since it was read
        return load_template(self.template).digest

    @override
    def required_special_tokens(self) -> Sequence[str]:
        return () if self.template is None else load_template(self.template).special_tokens


def _hide_texts(messages: Sequence[Message]) -> tuple[list[Message], list[_Hidden]]:
    """Returns messages with numbered placeholders in place of their texts, and these texts."""
    hidden: list[_Hidden] = []

    def hide(value: Any, index: int, field: str) -> Any:
        if isinstance(value, dict):
            return {hide(name, index, field): hide(item, index, field) for name, item in value.items()}
        if isinstance(value, list):
            return [hide(item, index, field) for item in value]
        if not isinstance(value, str) or not (text := value.strip()):
            return value
        hidden.append(_Hidden(text, index, field))
        # The white space around a text stays in the outline, because a template may strip it.
        return value.replace(text, _PLACEHOLDER.format(len(hidden) - 1), 1)

    outline = []
    for index, message in enumerate(messages):
        texts = {name: hide(message[name], index, name) for name in ("content", "name", *REASONING) if name in message}
        if calls := message.get("tool_calls"):
            functions = [
                {name: hide(value, index, "tool_calls") for name, value in call["function"].items()} for call in calls
            ]
            texts["tool_calls"] = [call | {"function": to} for call, to in zip(calls, functions, strict=True)]
        outline.append(message | texts)
    return outline, hidden


def _written(match: re.Match[str]) -> _Written:
    return _Written(int(match[1]), bool(match[2]))


def _is_file(template: str) -> bool:
    return template.endswith((".jinja", ".jinja2", ".json"))


def _read(name: str) -> tuple[str, dict[str, str]]:
    """Reads a template file, and the special tokens of the tokenizer_config.json in the same folder."""
    is_config = name.endswith(".json")
    folder, slash, _ = name.rpartition("/")
    path = name if is_config else f"{folder}{slash}{_CONFIG_FILE}"
    config = {}
    if is_config or file_exists(path):
        try:
            config = json.loads(read_file(path, "a template"))
        except ValueError as error:
            raise ConfigError(f"template={path}: is not JSON ({cause_of(error)}); use a {_CONFIG_FILE}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"template={path}: is not a JSON object; use a {_CONFIG_FILE}")
    source = config.get("chat_template") if is_config else read_file(name, "a template").decode(errors="replace")
    if isinstance(source, list):  # several named templates
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        raise ConfigError(f"template={path}: has no chat_template; use the .jinja file that came with it")
    found = {name: config.get(name) for name in _TOKEN_NAMES}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return source, {name: text for name, text in texts.items() if isinstance(text, str)}


class _Generation(Extension):
    """Marks `{% generation %}` blocks, as in Transformers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BLOCK_START}{caller()}{_BLOCK_END}"


def _jinja_environment() -> Environment:
    """Makes the sandbox of Transformers (`utils/chat_template_utils.py`), without the date."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
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
"""ChatML (OpenAI 2023), and the templates that are published with Llama 3 and Gemma 3."""
