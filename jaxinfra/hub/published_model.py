"""A model in the format of Hugging Face: what a folder holds, without reading its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flax import nnx

from jaxinfra.config import diff, validate
from jaxinfra.data.tokenizer import JsonTokenizer, Tokenizer
from jaxinfra.data.tokenizer.tokenizer_json import read_backend
from jaxinfra.errors import ConfigError, DataError, quoted
from jaxinfra.families.canonical import canonical, stated
from jaxinfra.families.common import Family
from jaxinfra.families.registry import family
from jaxinfra.interop.config_json import CONFIG, ModelJson, parse_json, read_json
from jaxinfra.interop.folder import ModelFolder, open_folder
from jaxinfra.interop.quantized import Quantization, open_weights, read_quantization
from jaxinfra.interop.reading import check_tensors
from jaxinfra.interop.rules import Binding
from jaxinfra.interop.safetensors import Weights, tensor_names
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import ParamSpec, leaves_by_name

TOKENIZER, GENERATION, TEMPLATE = "tokenizer.json", "generation_config.json", "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
SMALL_FILES = (_TOKENIZER_CONFIG, "special_tokens_map.json", TEMPLATE, GENERATION)
"""Files beside the weights and the tokenizer that say how texts begin and end."""


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model in a folder, without its weights.

    Attributes:
        folder: the folder.
        family: how its family is published.
        config: the model.
        max_positions: the longest sequence, by its `config.json` or the default of its family.
        quantization: how its weights are packed; None if they are not.
        keys: its `config.json`.
    """

    folder: ModelFolder
    family: Family
    config: TransformerConfig
    max_positions: int
    quantization: Quantization | None
    keys: Mapping[str, Any] = field(repr=False)

    def weights(self) -> Weights:
        """Reads the headers of its files; DataError if one is damaged."""
        return open_weights(self.folder, self.quantization)

    def bindings(self, shapes: Mapping[str, Sequence[int]], weights: Weights) -> list[Binding]:
        """Returns its tensors and the parameters in them."""
        return self.family.bindings(self.config, shapes, weights.tensors)

    def check(self, part: int = 0, of: int = 1, *, copies: bool = True) -> Weights:
        """Reads the headers, and raises ConfigError unless they have exactly the tensors of the model.

        A head beside the embedding that it is tied to must equal it: transformers 4 takes the embedding, 5 the head.
        With `copies`, so must those of modules for multi-token prediction. Each of `of` processes compares its `part`.
        """
        weights = self.weights()
        bindings = self.bindings(param_shapes(self.config), weights)
        unused = list(self.family.unused)
        if self.family.mtp is not None and self.config.mtp is None:
            unused.append(self.family.mtp.unused.replace("{num_layers}", str(self.config.num_layers)))
        check_tensors(weights.tensors, bindings, unused, self.folder.url)
        first = {each.parts[0].path: each.theirs for each in bindings if not each.is_copy}
        heads = [name for name in weights.tensors if name.endswith("lm_head.weight") and self.config.tie_embeddings]
        if others := [name for name in heads if not weights.equal(first["embedding"], name, part, of)]:
            fix = "set tie_word_embeddings to false there to use both, or remove one of them"
            raise ConfigError(
                f"{self.folder.url}: {others[0]} is not {first['embedding']}, but {CONFIG} ties them; {fix}"
            )
        for each in bindings if copies else ():
            original = first[each.parts[0].path]
            if each.is_copy and each.theirs in weights.tensors and not weights.equal(original, each.theirs, part, of):
                raise ConfigError(
                    f"{self.folder.url}: {each.theirs} is not {original}, which it copies; use model.mtp=none"
                )
        return weights

    def small_files(self) -> dict[str, bytes]:
        """Returns the contents of the small files that stay the same when the model is trained on."""
        contents = ((name, self.folder.read_or_none(name)) for name in SMALL_FILES)
        return {name: content for name, content in contents if content is not None}

    def stored_dtypes(self) -> dict[str, np.dtype]:
        """Returns the dtype that each parameter is stored in, by its path; float32 if that is not one of 16 bits."""
        weights, found = self.weights(), dict[str, np.dtype]()
        for binding in self.bindings(param_shapes(self.config), weights):
            if binding.is_copy:
                continue
            dtypes = [weights.tensors[name].dtype for name in binding.names if name in weights.tensors]
            is_half = len({*dtypes}) == 1 and str(dtypes[0]) in ("float16", "bfloat16")
            found |= dict.fromkeys((part.path for part in binding.parts), dtypes[0] if is_half else np.dtype("f4"))
        return found

    def end_ids(self, file: str = GENERATION) -> tuple[int, ...]:
        """Returns the tokens that end a text by a file, or by its `config.json` if it is missing; () if none does."""
        where, content = self.folder.url_of(file), self.folder.read_or_none(file)
        keys = self.keys if content is None else parse_json(content, where)
        text_keys = keys.get("text_config")
        found = keys.get("eos_token_id", text_keys.get("eos_token_id") if isinstance(text_keys, dict) else None)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(each) is int and 0 <= each < self.config.vocab_size for each in ids):
            where = where if content else self.folder.url_of(CONFIG)
            raise DataError(f"{where}: eos_token_id={quoted(found)} is no token of {self.config.vocab_size}")
        return tuple(ids)

    def tokenizer_end_ids(self) -> tuple[int, ...]:
        """Returns the token that ends a text by its tokenizer_config.json, where engines stop, too; () if none does."""
        content, tokens = (self.folder.read_or_none(file) for file in (_TOKENIZER_CONFIG, TOKENIZER))
        if content is None or tokens is None:
            return ()
        token = parse_json(content, self.folder.url_of(_TOKENIZER_CONFIG)).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        index = read_backend(tokens, self.folder.url_of(TOKENIZER)).token_to_id(text) if isinstance(text, str) else None
        return () if index is None else (index,)

    def tokenizer(self) -> Tokenizer:
        """Reads its tokenizer, whose end of document is the model's first; DataError if one is missing."""
        content = self.folder.read_or_none(TOKENIZER)
        where = self.folder.url_of(TOKENIZER)
        if content is None:
            raise DataError(f"{where}: missing; save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)")
        backend, ids = read_backend(content, where), self.end_ids(CONFIG) or self.end_ids()
        if not ids or (eos := backend.id_to_token(ids[0])) is None:
            raise DataError(f"{self.folder.url_of(CONFIG)}: eos_token_id={[*ids]} must name a token of {TOKENIZER}")
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        vocab = backend.get_vocab(with_added_tokens=True)
        size = 1 + max((index for text, index in vocab.items() if text not in special), default=0)
        if size > self.config.vocab_size:
            raise DataError(
                f"{where}: has {size} tokens, but the model {self.config.vocab_size}; take the one that came with the "
                "weights"
            )
        return JsonTokenizer.from_backend(backend, eos, where)

    def first_tokens(self) -> tuple[int, ...]:
        """Returns the tokens that its tokenizer puts before a text, such as the one that begins a document."""
        content = self.folder.read_or_none(TOKENIZER)
        assert content is not None, "has been read before"
        return tuple(read_backend(content, self.folder.url_of(TOKENIZER)).encode("").ids)


def open_published(source: str) -> PublishedModel:
    """Opens the model of a folder: `hf:DIR`, `hf:ORG/NAME[@REVISION]`, `hf:s3://BUCKET/DIR`.

    Raises ConfigError if the folder, the family or a key of its config is unknown, DataError if it is damaged.
    """
    folder = open_folder(source)
    keys = read_json(folder)
    found = family(keys.model_type, keys.where)
    try:
        config, quantization = found.read(keys), read_quantization(keys)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, MemoryError) as error:
        cause = f"{type(error).__name__}: {quoted(str(error), 200)}"
        raise ConfigError(f"{keys.where}: has a value that a {keys.model_type} cannot have ({cause})") from None
    keys.close(stated(config))
    if found.mtp is not None:
        config = found.mtp.stored_in(config, tensor_names(folder))
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{keys.where}: {error}") from None
    text_keys = ModelJson(keys.content.get("text_config") or keys.content, keys.where)
    longest = text_keys.take_between("max_position_embeddings", 1, default=found.max_positions)
    return PublishedModel(
        folder=folder,
        family=found,
        config=config,
        max_positions=longest if config.learned_positions is None else config.learned_positions,
        quantization=quantization,
        keys=keys.content,
    )


def published(source: str, vocab_size: int | None = None) -> TransformerConfig:
    """Returns the model of a folder for a config: `model=published("hf:meta-llama/Llama-3.2-1B")`.

    With a larger `vocab_size` it has room for tokens that were added to its tokenizer. Their rows of the embedding, and
    their columns of the head, begin as the mean of the others (Hewitt 2021, "Initializing new word embeddings").
    """
    config = open_published(source).config
    if vocab_size is None:
        return config
    if vocab_size < config.vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: {source} has {config.vocab_size} tokens, which it keeps; use "
            f"vocab_size={config.vocab_size} or more"
        )
    return replace(config, vocab_size=vocab_size)


def param_specs(config: TransformerConfig) -> dict[str, ParamSpec]:
    """Returns the declarations of a model's parameters by path, without devices."""
    return leaves_by_name(nnx.to_pure_dict(nnx.split(config.build(Partitioner()))[1]))


def param_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by path, without devices."""
    return {path: spec.shape for path, spec in param_specs(config).items()}


def differences(left: TransformerConfig, right: TransformerConfig) -> list[Any]:
    """Returns the fields in which two models have other logits."""
    return diff(canonical(left), canonical(right), fingerprinted_only=True)
