"""Writes a model as a folder that transformers loads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from jaxinfra.config.text import format_value
from jaxinfra.data.tokenizer import JsonTokenizer, Tokenizer
from jaxinfra.data.tokenizer.tokenizer_json import read_backend
from jaxinfra.errors import ConfigError
from jaxinfra.families.common import Family
from jaxinfra.families.registry import all_families, family
from jaxinfra.hub.published_model import GENERATION, TEMPLATE, TOKENIZER, PublishedModel, differences
from jaxinfra.interop.config_json import CONFIG, ModelJson
from jaxinfra.interop.writing import write_model
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.spec import Params, leaves_by_name

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is written.

    Attributes:
        config: the model.
        params: its parameters.
        source: where they are from, for the receipt.
        tokenizer: its tokenizer; None writes none.
        max_positions: the longest sequence, which the keys of the config tell.
        first_tokens: tokens that stand before a text; the tokenizer that is written adds them.
        dtypes: of the tensors, by the path of the parameter; the others keep theirs.
        model_type: the family; None takes one that can say what the model has.
        origin: the model that it comes from, whose special tokens and small files are kept.
        chat_template: the source of the template of its conversations; None keeps that of the origin.
        end_of_turn: tokens that end an answer, which the generation config names beside those that end a text.
    """

    config: TransformerConfig
    params: Params
    source: Mapping[str, Any]
    tokenizer: Tokenizer | None
    max_positions: int
    first_tokens: Sequence[int] = ()
    dtypes: Mapping[str, np.dtype] = field(default_factory=dict)
    model_type: str | None = None
    origin: PublishedModel | None = None
    chat_template: str | None = None
    end_of_turn: Sequence[int] = ()


def export_model(destination: str, export: Export, **options: Any) -> dict[str, Any]:
    """Writes a model into a folder that transformers loads; returns the receipt. All processes must call it.

    Args:
        destination: a new folder on a disk that all processes share, or a URL.
        export: what is written.
        options: of `write_model`: `max_file_bytes`, `gather` and `progress`.
    """
    found, keys = family_of(export.config, export.model_type, [] if export.origin is None else [export.origin.family])
    leaves = leaves_by_name(export.params)
    content = {
        "architectures": [found.architecture],
        "model_type": found.model_type,
        "bos_token_id": None,  # the defaults of a family may be outside of the vocabulary
        "pad_token_id": None,
        "max_position_embeddings": export.max_positions,
        **keys,  # which may have the length that rotary positions are scaled to
        "torch_dtype": str(export.dtypes.get("embedding", leaves["embedding"].dtype)),
    }
    others = {} if export.origin is None else export.origin.small_files()
    if isinstance(export.tokenizer, JsonTokenizer):
        others[TOKENIZER], end = beginning_with(export.first_tokens, export.tokenizer), export.tokenizer.end_of_document
        content |= {
            "eos_token_id": export.tokenizer.eot_id,
            "bos_token_id": [*export.first_tokens, export.tokenizer.eot_id][0],
        }
        # As GPT-2 is published: engines need a token that begins texts, and one for what is unknown.
        default = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end, "unk_token": end}
        others.setdefault("tokenizer_config.json", _json(default | {"clean_up_tokenization_spaces": False}))
    if export.origin is not None:
        content |= {name: export.origin.keys[name] for name in _SPECIAL_IDS if name in export.origin.keys}
    others[CONFIG] = _json(content)
    if export.chat_template is not None:
        others[TEMPLATE] = export.chat_template.encode()
        ends = () if export.origin is None else export.origin.end_ids()
        others[GENERATION] = with_ends(others, [*(ends or [content["eos_token_id"]]), *export.end_of_turn])
    bindings = found.bindings(export.config, {path: leaf.shape for path, leaf in leaves.items()})
    options |= {"source": export.source, "dtypes": export.dtypes}
    return write_model(destination, leaves, bindings, others, **options)


def with_ends(files: Mapping[str, bytes], ends: Sequence[int]) -> bytes:
    """Returns the generation config of these files with the tokens that end a text or a turn."""
    return _json(json.loads(files.get(GENERATION, b"{}")) | {"eos_token_id": [*dict.fromkeys(ends)]})


def family_of(
    config: TransformerConfig, model_type: str | None = None, first: Sequence[Family] = ()
) -> tuple[Family, dict[str, Any]]:
    """Returns the family that can say what a model has, and its keys of `config.json`.

    Without a `model_type` it is one of `first`, or else the first one of all. Raises ConfigError that names the field
    that none can say, of the family that comes nearest.
    """
    tried = list[tuple[int, Family, str]]()
    for each in chain(first, all_families()) if model_type is None else [family(model_type, "--family")]:
        try:
            keys = each.write(config)
            again = each.read(ModelJson({"model_type": each.model_type} | keys))
        except ConfigError as error:
            tried.append((1000, each, f"cannot say what the model has: {error}"))
            continue
        if not (differing := differences(config, again)):
            return each, keys
        text = f"has no model.{differing[0].path}={format_value(differing[0].left)}"
        tried.append((len(differing), each, text))
    _, nearest, text = min(tried, key=lambda each: each[0])
    others = ", and no other family of models here has what this one has" if model_type is None else ""
    raise ConfigError(f"{nearest.architecture} {text}{others}")


def beginning_with(first_tokens: Sequence[int], tokenizer: JsonTokenizer) -> bytes:
    """Returns the content of a tokenizer that puts these tokens before a text, and no others."""
    backend = read_backend(tokenizer.content, TOKENIZER)
    if backend.encode("").ids == [*first_tokens]:
        return tokenizer.content
    content = json.loads(tokenizer.content)
    old = content.get("post_processor") or {}
    kept = [each for each in old.get("processors", [old]) if each.get("type") == "ByteLevel"]  # adds no tokens
    texts = [str(backend.id_to_token(index)) for index in first_tokens]
    first = [{"SpecialToken": {"id": text, "type_id": 0}} for text in texts]
    one, other = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    tokens = {
        text: {"id": text, "ids": [index], "tokens": [text]} for text, index in zip(texts, first_tokens, strict=True)
    }
    template = {
        "type": "TemplateProcessing",
        "single": [*first, one],
        "pair": [*first, one, other],
        "special_tokens": tokens,
    }
    content["post_processor"] = {"type": "Sequence", "processors": [*kept, template]}
    changed = json.dumps(content, ensure_ascii=False).encode()
    assert read_backend(changed, TOKENIZER).encode("").ids == [*first_tokens]
    return changed


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
