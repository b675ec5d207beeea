"""Jinja templates of conversations, as models are published with them: `chat_template.jinja`, `tokenizer_config.json`.

They run in the sandbox, with the names and filters that the field gives them (Transformers, `apply_chat_template`). The
day is not among them: the same record gives the same document tomorrow.
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, Self

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.document import RecordError
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import exists, read_content

_CONFIG = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_MARKER = re.compile(r"<[^<>\s]+>")  # as presets spell special tokens
_BEGIN, _END = "\U0010fffe", "\U0010ffff"  # noncharacters, which no text has
BLOCK = re.compile(f"{_BEGIN}[^{_BEGIN}]*?{_END}")
"""A generation block in what is rendered with `blocks`."""


def is_file(template: str) -> bool:
    """Tells whether a template is one of a file, by its name."""
    return template.endswith((".jinja", ".jinja2", ".json"))


class JinjaTemplate:
    """A template, compiled.

    Attributes:
        generates: whether it has `{% generation %}` blocks, which hold what the assistant writes.
        digest: hash of its text and of the special tokens that it may use.
        markers: special tokens that it writes: of a file those that it uses by their names.
    """

    def __init__(self, source: str, tokens: dict[str, str], name: str):
        """Compiles a template that may use special tokens by name; a ConfigError says what is wrong with it."""
        self._name = name
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
        self.markers = tuple(by_name if is_file(name) else dict.fromkeys(_MARKER.findall(source)))
        self.generates = any(isinstance(node.node, nodes.ExtensionAttribute) for node in parsed.find_all(nodes.Call))
        self._names = tokens | {"tools": None, "documents": None}

    @classmethod
    def load(cls, template: str) -> Self:
        """Takes a preset, or reads a .jinja or a tokenizer_config.json; raises a ConfigError if it has no template."""
        if not is_file(template):
            return cls(PRESETS[template], {}, template)
        path = template if template.endswith(".json") else "".join((*template.rpartition("/")[:2], _CONFIG))
        config = _config(path) if path == template or exists(path) else {}
        source = (
            _source(config, path) if path == template else read_content(template, "a template").decode(errors="replace")
        )
        tokens = {name: config.get(name) for name in _TOKENS}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        return cls(source, {name: text for name, text in texts.items() if isinstance(text, str)}, template)

    def render(self, messages: list[dict[str, str]], *, answering: bool = False, blocks: bool = False) -> str:
        """Writes messages, each with a role and a content, as text, or raises a RecordError of the template's words.

        Args:
            messages: the conversation.
            answering: whether an answer is to follow (`add_generation_prompt`).
            blocks: whether noncharacters are left around generation blocks, as `BLOCK` finds them.
        """
        try:
            text = self._template.render(messages=messages, add_generation_prompt=answering, **self._names)
        except TemplateError as error:
            raise RecordError(f"the template {self._name} refuses the conversation: {cause_of(error)}") from None
        return text if blocks else without_blocks(text)


def without_blocks(text: str) -> str:
    """Takes away what `render` leaves around generation blocks."""
    return text.replace(_BEGIN, "").replace(_END, "")


def _config(path: str) -> dict[str, Any]:
    try:
        config = json.loads(read_content(path, "a template"))
    except ValueError as error:
        raise ConfigError(f"template={path}: is not JSON ({cause_of(error)}); give a {_CONFIG}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"template={path}: is not a {_CONFIG}, which holds named values")
    return config


def _source(config: dict[str, Any], path: str) -> str:
    """Returns the template of a tokenizer_config.json; of several the one called default."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if not isinstance(found, str):
        raise ConfigError(f"template={path}: has no chat_template; give the .jinja file that came with it")
    return found


class _Generation(Extension):
    """`{% generation %}` marks what the assistant writes, as in Transformers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _environment() -> Environment:
    """The sandbox of Transformers (`utils/chat_template_utils.py`), without the date."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
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
