"""Models in the format of Hugging Face: what a folder holds, its parameters on a mesh, and a model written as one."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.config import diff, validate
from jaxinfra.config.text import format_value
from jaxinfra.data.tokenizer import JsonTokenizer, Tokenizer
from jaxinfra.data.tokenizer.tokenizer_json import read_backend
from jaxinfra.errors import ConfigError, DataError, quoted
from jaxinfra.interop.config_json import CONFIG, ModelJson, parse_json, read_json
from jaxinfra.interop.folder import ModelFolder, open_folder
from jaxinfra.interop.quantized import Quantization, open_weights, read_quantization
from jaxinfra.interop.reading import check_tensors, read_params
from jaxinfra.interop.rules import Binding
from jaxinfra.interop.safetensors import Weights
from jaxinfra.interop.writing import Gather, write_model
from jaxinfra.models.families import Family, all_families, family
from jaxinfra.models.families.canonical import canonical, stated
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import Params, ParamSpec

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION)


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

    def check(self, part: int = 0, of: int = 1) -> Weights:
        """Reads the headers, and raises ConfigError unless they have exactly the tensors of the model.

        A head beside the embedding that it is tied to must equal it: transformers 4 takes the embedding, 5 the head.
        Each of `of` processes compares its `part`.
        """
        weights, unused = self.weights(), self.family.unused_by(self.config)
        bindings = self.bindings(param_shapes(self.config), weights)
        check_tensors(weights.tensors, bindings, unused, self.folder.url)
        (embedding,) = (each.theirs for each in bindings if each.parts[0].path == "embedding")
        heads = [name for name in weights.tensors if name.endswith("lm_head.weight") and self.config.tie_embeddings]
        if others := [name for name in heads if not weights.equal(embedding, name, part, of)]:
            fix = "set tie_word_embeddings to false there to use both, or remove one of them"
            raise ConfigError(f"{self.folder.url}: {others[0]} is not {embedding}, but {CONFIG} ties them; {fix}")
        return weights

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


def published(source: str) -> TransformerConfig:
    """Returns the model of a folder for a config: `model=published("hf:meta-llama/Llama-3.2-1B")`."""
    return open_published(source).config


def param_specs(config: TransformerConfig) -> dict[str, ParamSpec]:
    """Returns the declarations of a model's parameters by path, without devices."""
    mesh = MeshConfig(fsdp=1)
    partitioner = Partitioner(rules=ShardingRules(), mesh=mesh, platform="cpu", compute_dtype=jnp.dtype("float32"))
    return by_path(nnx.to_pure_dict(nnx.split(config.build(partitioner))[1]))


def param_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by path, without devices."""
    return {path: spec.shape for path, spec in param_specs(config).items()}


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a nested dict by dotted path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def load_published(source: str, config: object, params: Params) -> tuple[Params, str]:
    """Reads the parameters of a folder onto the current mesh; returns them and a fingerprint of the folder.

    All processes must call it. Raises ConfigError if the folder has another model than `config`. `params` has a
    `ShapeDtypeStruct` for each parameter.
    """
    model = open_published(source)
    _require_same(config, model, source)
    weights, wanted = model.check(jax.process_index(), jax.process_count()), by_path(params)
    bindings = model.bindings({path: each.shape for path, each in wanted.items()}, weights)
    found = read_params(weights, bindings, wanted)
    files = sorted({each.file for each in weights.tensors.values()})
    headers = sorted((name, str(each)) for name, each in weights.tensors.items())
    headers += [(file, model.folder.version(file)) for file in files]
    fingerprint = hashlib.sha256(repr(headers).encode()).hexdigest()[:16]
    return jax.tree.unflatten(jax.tree.structure(params), [found[path] for path in wanted]), fingerprint


def _require_same(config: object, model: PublishedModel, source: str) -> None:
    """Raises ConfigError that names the first field in which a run's model is another one."""
    if not isinstance(config, TransformerConfig):
        raise ConfigError(f"init={source}: the model of the run is a {type(config).__qualname__}, not a decoder")
    if differing := differences(config, model.config):
        path, ours, theirs = differing[0].path, differing[0].left, differing[0].right
        raise ConfigError(
            f"init={source}: model.{path} is {format_value(ours)}, there it is {format_value(theirs)}; "
            f'use the model of the folder: model=published("{source}"), from jaxinfra.hub'
        )


def check_init(source: str, config: object, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError if a folder has another model or tokenizer than the run that begins with it."""
    model = open_published(source)
    _require_same(config, model, source)
    if (content := model.folder.read_or_none(TOKENIZER)) is None or tokenizer is None:
        return
    where = model.folder.url_of(TOKENIZER)
    theirs = read_backend(content, where).get_vocab(with_added_tokens=True)
    ours = tokenizer.vocab if isinstance(tokenizer, JsonTokenizer) else {}
    others = [f": {quoted(token)} is {index}, there {theirs.get(token, 'missing')}" for token, index in ours.items()
              if theirs.get(token) != index]  # fmt: skip
    if not ours or others:
        raise ConfigError(
            f"init={source}: the data has another tokenizer{''.join(others[:1])}; prepare it with "
            f'tokenizer=TokenizerFile(path="{where}")'
        )


def differences(left: TransformerConfig, right: TransformerConfig) -> list[Any]:
    """Returns the fields in which two models have other logits."""
    return diff(canonical(left), canonical(right), fingerprinted_only=True)


# Writing


def family_of(
    config: TransformerConfig, model_type: str | None = None, first: Sequence[Family] = ()
) -> tuple[Family, dict[str, Any]]:
    """Returns the family that can say what a model has, and its keys of `config.json`.

    Without a `model_type` it is one of `first`, or else the first one of all. Raises ConfigError that names the field
    that none can say, of the family that comes nearest.
    """
    tried = list[tuple[int, Family, str]]()
    for each in [*first, *all_families()] if model_type is None else [family(model_type, "--family")]:
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


def export_model(
    destination: str,
    config: TransformerConfig,
    params: Params,
    *,
    source: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    max_positions: int,
    first_tokens: Sequence[int] = (),
    dtype: jnp.dtype | None = None,
    model_type: str | None = None,
    origin: PublishedModel | None = None,
    gather: Gather = lambda value: [value],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes a model into a folder that transformers loads; returns the receipt. All processes must call it.

    Args:
        destination: a new folder on a disk that all processes share, or a URL.
        config: the model.
        params: its parameters.
        source: what is exported, for the receipt.
        tokenizer: its tokenizer.
        max_positions: the longest sequence, which the keys of the config tell.
        first_tokens: tokens that stand before a text; the tokenizer that is written adds them.
        dtype: of the tensors; None keeps that of the parameters. Buffers, such as biases of routers, keep theirs.
        model_type: the family; None takes one that can say what the model has.
        origin: the model that it comes from, whose special tokens and small files are kept.
        gather: see `Gather`.
        progress: called with the bytes that are written, and with all of them.
    """
    found, keys = family_of(config, model_type, [] if origin is None else [origin.family])
    leaves = by_path(params)
    stored = dtype or next(iter(leaves.values())).dtype
    content = {
        "architectures": [found.architecture],
        "model_type": found.model_type,
        "bos_token_id": None,  # the defaults of a family may be outside of the vocabulary
        "pad_token_id": None,
        "max_position_embeddings": max_positions,
        **keys,  # which may have the length that rotary positions are scaled to
        "torch_dtype": str(jnp.dtype(stored)),
    }
    others = {} if origin is None else _small_files(origin.folder)
    if isinstance(tokenizer, JsonTokenizer):
        others[TOKENIZER], end = beginning_with(first_tokens, tokenizer), tokenizer.end_of_document
        content |= {"eos_token_id": tokenizer.eot_id, "bos_token_id": [*first_tokens, tokenizer.eot_id][0]}
        # As GPT-2 is published: engines need a token that begins texts, and one for what is unknown.
        default = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end, "unk_token": end}
        others.setdefault("tokenizer_config.json", _json(default | {"clean_up_tokenization_spaces": False}))
    if origin is not None:
        content |= {name: origin.keys[name] for name in _SPECIAL_IDS if name in origin.keys}
    others[CONFIG] = _json(content)
    bindings = found.bindings(config, {path: leaf.shape for path, leaf in leaves.items()})
    specs = param_specs(config)
    dtypes = {} if dtype is None else {path: dtype for path, spec in specs.items() if spec.state != "buffer"}
    return write_model(
        destination, leaves, bindings, others, source=source, dtypes=dtypes, gather=gather, progress=progress
    )


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


def _small_files(folder: ModelFolder) -> dict[str, bytes]:
    """Returns the small files of a folder that stay the same when the model is trained on."""
    contents = ((name, folder.read_or_none(name)) for name in _SMALL_FILES)
    return {name: content for name, content in contents if content is not None}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
