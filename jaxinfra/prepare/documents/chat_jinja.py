"""Jinja templates of conversations, as models are published with them: `chat_template.jinja`, `tokenizer_config.json`.

They run in the sandbox, with the names and filters that the field gives them (Transformers, `apply_chat_template`). The
day is not among them: the same record gives the same document tomorrow.
"""

import hashlib
import json
from typing import Any, Self

from jaxinfra.errors import ConfigError
from jaxinfra.packages import needed
from jaxinfra.prepare.documents.document import RecordError
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import exists, read_content

_CONFIG = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def is_file(template: str) -> bool:
    """Whether a template is one of a file, by its name."""
    return template.endswith((".jinja", ".jinja2", ".json"))


class JinjaTemplate:
    """A template, compiled.

    Attributes:
        digest: hash of its text and of the special tokens that it may use.
        markers: special tokens that it uses by their names.
    """

    def __init__(self, source: str, tokens: dict[str, str], name: str):
        """Takes the text of a template and the special tokens that it may use by name.

        Raises:
            ConfigError: it is no template, uses tokens that are not given, or jinja2 is not installed.
        """
        self._name = name
        self._library = _library()
        environment = _environment(self._library)
        try:
            used = self._library.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except self._library.TemplateError as error:
            raise ConfigError(f"template={name}: is not a template ({cause_of(error)})") from None
        if missing := sorted(used & set(_TOKENS) - tokens.keys()):
            raise ConfigError(f"template={name}: uses {missing[0]}; give the {_CONFIG} that defines it beside the file")
        self.digest = hashlib.sha256(json.dumps([source, tokens], sort_keys=True).encode()).hexdigest()
        self.markers = tuple(tokens[name] for name in sorted(used & tokens.keys()))
        self._names = tokens | {"tools": None, "documents": None, "add_generation_prompt": False}

    @classmethod
    def load(cls, path: str) -> Self:
        """Reads a template, from a file of its own or from a tokenizer_config.json.

        Raises:
            ConfigError: it cannot be read, has no template, or jinja2 is not installed.
        """
        if path.endswith(".json"):
            config = _config(path)
            return cls(_source(config, path), _tokens(config), path)
        source = read_content(path, "a template").decode(errors="replace")
        beside = path.rpartition("/")[0]
        config_path = f"{beside}/{_CONFIG}" if beside else _CONFIG
        tokens = _tokens(_config(config_path)) if exists(config_path) else {}
        return cls(source, tokens, path)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The conversation as text.

        Raises:
            RecordError: the template refuses it.
        """
        try:
            return self._template.render(messages=messages, **self._names)
        except self._library.TemplateError as error:
            raise RecordError(f"the template {self._name} refuses the conversation: {cause_of(error)}") from None


def _config(path: str) -> dict[str, Any]:
    try:
        config = json.loads(read_content(path, "a template"))
    except ValueError as error:
        raise ConfigError(f"template={path}: is not JSON ({cause_of(error)}); give a {_CONFIG}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"template={path}: is not a {_CONFIG}, which holds named values")
    return config


def _source(config: dict[str, Any], path: str) -> str:
    """The template of a tokenizer_config.json; of several the one called default."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if not isinstance(found, str):
        raise ConfigError(f"template={path}: has no chat_template; give the .jinja file that came with it")
    return found


def _tokens(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by name; each is a text, or has one as its content."""
    found = {name: config.get(name) for name in _TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _environment(library: Any) -> Any:
    """The sandbox of Transformers (`utils/chat_template_utils.py`), without the date."""

    def refuse(message: str) -> None:
        raise library.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    class Generation(library.ext.Extension):
        """`{% generation %}` marks answers for Transformers; here it writes what is in it."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = library.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, library.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment


def _library() -> Any:
    return needed("jinja2", "ext", "meta", "sandbox", by="a template in a file", install="jaxinfra[chat]")
