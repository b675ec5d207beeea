"""Reads `config.json`, and refuses what it does not understand.

A key that is not read and not known to be harmless ends the reading: it may change the numbers of the model.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError, DataError, quoted
from jaxinfra.interop.folder import FIX, ModelFolder

CONFIG = "config.json"

HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures",
    "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "do_sample", "early_stopping",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "max_position_embeddings", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torchscript", "transformers_version", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
    "attention_dropout", "attn_pdrop", "embd_pdrop", "embedding_dropout", "hidden_dropout", "resid_pdrop",
})  # fmt: skip
"""Keys that do not change the logits of a model, whatever their values; a run has its own `model.dropout`."""

MAX_LAYERS = 10_000
"""The most layers of a model that is read."""

type Fields = Mapping[str, tuple[str, type]]
"""Fields of a config class: for each the key in `config.json` and its type."""


class ModelJson:
    """The keys of a `config.json`, each to be taken once.

    Attributes:
        content: all of them.
        where: its path or URL, for messages.
    """

    def __init__(self, content: Mapping[str, Any], where: str = CONFIG):
        self.content, self.where, self._taken = dict(content), where, set[str]()
        self._defaults = dict[str, object]()

    @property
    def model_type(self) -> str:
        """The family of the model."""
        return self.take("model_type", str)

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return self.take_between("num_hidden_layers", 1, MAX_LAYERS)

    def __contains__(self, name: str) -> bool:
        return self._get(name) is not None

    def default(self, **values: object) -> None:
        """Gives values to keys that are missing: the family's defaults, which published files leave out."""
        self._defaults |= values

    def _get(self, name: str) -> Any:
        return self.content[name] if name in self.content else self._defaults.get(name)

    def take[T](self, name: str, kind: type[T], default: T | None = None) -> T:
        """Returns the value of a key.

        A key that is missing or null has the default. Raises ConfigError if there is none, or if the value is of
        another type; an integer is a float, too.
        """
        self._taken.add(name)
        value = self._get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.where}: has no {name}; it must be of type {kind.__name__}")
        if kind is float and type(value) is int:
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {name} is {quoted(repr(value))}, expected {kind.__name__}")
        return value

    def take_fields(self, fields: Fields, **defaults: Any) -> dict[str, Any]:
        """Returns the values of fields; raises ConfigError if a key is missing whose field is not in `defaults`."""
        return {field: self.take(key, kind, defaults.get(field)) for field, (key, kind) in fields.items()}

    def optional[T](self, name: str, kind: type[T]) -> T | None:
        """Returns the value of a key, None if it is missing or null."""
        self._taken.add(name)
        return self.take(name, kind) if name in self else None

    def require(self, name: str, *values: object, default: object = None) -> None:
        """Raises ConfigError unless a key has one of the values, the default if it is missing."""
        self._taken.add(name)
        found = self._get(name)
        if (default if found is None else found) not in values:
            expected = " or ".join(map(repr, values))
            raise ConfigError(f"{self.where}: {name}={quoted(repr(found))} is not supported, only {expected}")

    def take_kinds[T](self, name: str, kinds: Collection[T], count: int, default: Sequence[T]) -> list[T]:
        """Returns the kind of each of `count` layers; raises ConfigError for another number, or an unknown kind."""
        found = self.take(name, list, [*default]) or [*default]
        unknown = [kind for kind in found if kind not in [*kinds]]
        if len(found) != count or unknown:
            cause = f"{quoted(repr(unknown[0]))} is not supported" if unknown else f"{len(found)} kinds"
            raise ConfigError(f"{self.where}: {name} must have a kind for each of {count} layers: {cause}")
        return found

    def take_between(self, name: str, low: int, high: int | None = None, default: int | None = None) -> int:
        """Returns an integer from `low` to `high`, without an end if that is None; raises ConfigError for another."""
        found = self.take(name, int, default)
        if found < low or (high is not None and found > high):
            expected = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{self.where}: {name}={quoted(found)} must be {expected}")
        return found

    def take_indices(self, name: str, count: int, default: Sequence[int] = ()) -> list[int]:
        """Returns the indices of some of `count` layers; raises ConfigError if one is no layer."""
        found = self.take(name, list, [*default])
        if unknown := [each for each in found if type(each) is not int or not 0 <= each < count]:
            which = quoted(repr(unknown[0]))
            raise ConfigError(f"{self.where}: {name} has {which}, but layers have the indices 0 to {count - 1}")
        return found

    def part(self, name: str) -> "ModelJson":
        """Returns the keys of an object in the file."""
        return ModelJson(self.take(name, dict), f"{self.where}: {name}")

    def ignore(self, *names: str) -> None:
        """Takes keys without a meaning for the logits."""
        self._taken.update(names)

    def close(self, stated: Mapping[str, object] | None = None) -> None:
        """Raises ConfigError for the first key that was not taken and has no value that is `stated` for it."""
        for name, value in self.content.items():
            if name in self._taken or name in HARMLESS or value is None:
                continue
            if name not in (stated := stated or {}):
                near = nearest(name, self._taken)
                hint = f", did you mean {near}?" if near else ""
                raise ConfigError(
                    f"{self.where}: {quoted(name)}={quoted(repr(value))} is not known{hint}; it may change the numbers "
                    "of the model, so remove it only if it does not"
                )
            self.require(name, stated[name])


def write_fields(config: object, fields: Fields) -> dict[str, Any]:
    """Returns the keys of fields, the inverse of `ModelJson.take_fields`."""
    return {key: getattr(config, field) for field, (key, _) in fields.items()}


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object; raises DataError if it is none, or has a key twice, of which readers take either."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{quoted(twice)} is in it twice")
        return found

    try:
        found = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({quoted(str(error), 200)}); {FIX}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: is no JSON object; {FIX}")
    return found


EXPORT_PLAN = ".unfinished/plan.json"
"""The file that lists what an export writes; an export that has finished has none."""


def read_json(folder: ModelFolder) -> ModelJson:
    """Reads the `config.json` of a folder; raises DataError if there is none or it is damaged."""
    content = folder.read_or_none(CONFIG)
    where = folder.url_of(CONFIG)
    if content is None:
        if folder.exists(EXPORT_PLAN):
            fix = "start the same hub export again, which goes on with it"
            raise DataError(f"{folder.url}: is an export that has not finished; {fix}")
        other = ""
        if where.startswith("hf://"):
            other = f" (there is no folder {folder.url.removeprefix('hf://')} here), or set HF_TOKEN if it is private"
        raise DataError(f"{where}: missing; name the folder of a model in the format of Hugging Face{other}")
    return ModelJson(parse_json(content, where), where)
