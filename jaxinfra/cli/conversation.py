"""Finds the chat template of a model, and the tokens that end a turn in it."""

import logging
from dataclasses import replace

from jaxinfra.cli.tune import templates_of
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.errors import ConfigError
from jaxinfra.hub.peft import open_base
from jaxinfra.inference.language_model import LanguageModel, conversation_template_name
from jaxinfra.interop.folder import is_published
from jaxinfra.prepare.documents.chat_template import PRESETS, ChatTemplate
from jaxinfra.prepare.documents.document import RecordError

_log = logging.getLogger(__name__)


def conversation_template(
    source: str, model: LanguageModel, wanted: str | None, *, own_only: bool = False
) -> ChatTemplate:
    """Returns the template of the conversations that a run has trained on, or that of a published model.

    A published model without one gets a preset whose tokens it has, unless `own_only`.
    """
    if wanted is not None:
        return ChatTemplate(wanted)
    fix = "name one with --template, such as chatml or a .jinja file"
    if is_published(source):
        for name in templates_of(open_base(source)):
            if own_only and name in PRESETS:
                continue
            if name in PRESETS:
                _log.warning(f"{source}: has no chat template; taking {name}, whose tokens it has")
            return ChatTemplate(name)
        raise ConfigError(f"{source}: has no chat template; {fix}")
    if (template := trained_template(model)) is None:
        raise ConfigError(f"{source}: has not been trained on conversations; {fix}")
    return template


def trained_template(model: LanguageModel) -> ChatTemplate | None:
    """Returns the template of the conversations that the model of a run was trained on; None for other data."""
    name = conversation_template_name(model.run)
    return None if name is None else ChatTemplate(name)


def with_end_of_turn(model: LanguageModel, template: ChatTemplate) -> LanguageModel:
    """Returns a model whose texts also end where an answer ends; ConfigError if the template cannot write one."""
    try:
        return replace(model, end_ids=(*model.end_ids, *end_of_turn(template, model.tokenizer)))
    except RecordError as error:
        raise ConfigError(f"{error}; name another template with --template") from None


def end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the special tokens that the template writes after an answer."""
    spans = template.to_spans([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], (1,))
    after = spans[1 + max(index for index, span in enumerate(spans) if not span.from_template) :]
    return tuple(part for span in after for part in tokenizer.split(span.text) if isinstance(part, int))
