"""Parameters of a model in the format of Hugging Face, onto a mesh."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.config.text import format_value
from jaxinfra.data.tokenizer import JsonTokenizer, Tokenizer
from jaxinfra.data.tokenizer.tokenizer_json import read_backend
from jaxinfra.errors import ConfigError, quoted
from jaxinfra.hub.peft import PeftAdapter, open_base, open_peft
from jaxinfra.hub.published_model import TOKENIZER, PublishedModel, differences, open_published, param_shapes
from jaxinfra.interop.reading import Keep, read_params
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.spec import Params, leaves_by_name, nested

__all__ = ["PeftAdapter", "check_init", "load_published", "open_peft"]


def load_published(
    source: str,
    config: object,
    params: Params,
    dtypes: Mapping[str, np.dtype] | None = None,
    keep: Keep = lambda path, array: {path: array},
) -> tuple[Params, str]:
    """Reads the parameters of a folder onto the current mesh; returns them and a fingerprint of the folder.

    All processes must call it. Raises ConfigError if the folder has another model than `config`. `params` has a
    `ShapeDtypeStruct` for each parameter, and `dtypes` by path replace theirs. `keep` says what is kept of each
    parameter as soon as it is read. If the vocabulary of `config` is larger, the parameters grow (see `published`).
    """
    model = open_published(source)
    _require_same(config, model, source)
    # A run without modules for multi-token prediction leaves those of the folder there.
    weights = model.check(jax.process_index(), jax.process_count(), copies=getattr(config, "mtp", None) is not None)
    own = dtypes or {}
    wanted = {path: each.update(dtype=own.get(path, each.dtype)) for path, each in leaves_by_name(params).items()}
    shapes = {path: shape for path, shape in param_shapes(model.config).items() if path in wanted}
    stored = {path: _as_stored(each, shapes[path]) for path, each in wanted.items()}
    bindings = model.bindings(shapes, weights)
    found = read_params(weights, bindings, stored, lambda path, array: keep(path, _grown(array, wanted[path])))
    files = sorted({each.file for each in weights.tensors.values()})
    headers = sorted((name, str(each)) for name, each in weights.tensors.items())
    headers += [(file, model.folder.generation(file).hex()) for file in files]
    fingerprint = hashlib.sha256(repr(headers).encode()).hexdigest()[:16]
    return nested(found), fingerprint


def _as_stored(wanted: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns how a parameter is read: whole along the dimension in which it grows."""
    if wanted.shape == shape:
        return wanted
    assert isinstance(wanted.sharding, NamedSharding)
    axes = [*wanted.sharding.spec, *[None] * (len(shape) - len(wanted.sharding.spec))]
    axes[_grown_dim(shape, wanted.shape)] = None
    return wanted.update(shape=shape, sharding=NamedSharding(wanted.sharding.mesh, P(*axes)))


def _grown(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a parameter with the rows that it lacks, each the mean of those that it has."""
    if array.shape == wanted.shape:
        return array
    assert isinstance(wanted.sharding, NamedSharding)
    spec, dim = wanted.sharding.spec, _grown_dim(array.shape, wanted.shape)
    added = wanted.shape[dim] - array.shape[dim]

    @jax.jit
    def grow(array: jax.Array) -> jax.Array:
        mean = jnp.mean(array, axis=dim, keepdims=True, dtype=jnp.float32).astype(array.dtype)
        return jax.reshard(jnp.concatenate([array, *[mean] * added], axis=dim), spec)

    return grow(array)


def _grown_dim(shape: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    return next(dim for dim, sizes in enumerate(zip(shape, wanted, strict=True)) if len({*sizes}) > 1)


def _require_same(config: object, model: PublishedModel, source: str) -> None:
    """Raises ConfigError that names the first field in which a run's model is another one."""
    if not isinstance(config, TransformerConfig):
        raise ConfigError(f"init={source}: the model of the run is a {type(config).__qualname__}, not a decoder")
    own = replace(config, vocab_size=model.config.vocab_size) if config.vocab_size > model.config.vocab_size else config
    there = replace(model.config, mtp=None) if own.mtp is None else model.config
    if differing := differences(own, there):
        path, ours, theirs = differing[0].path, differing[0].left, differing[0].right
        base = source if (peft := open_peft(source)) is None else peft.source
        raise ConfigError(
            f"init={source}: model.{path} is {format_value(ours)}, there it is {format_value(theirs)}; "
            f'use the model of the folder: model=published("{base}"), from jaxinfra.hub'
        )


def check_init(source: str, config: object, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError if a folder has another model or tokenizer than the run that begins with it."""
    model = open_base(source)
    _require_same(config, model, source)
    if (content := model.folder.read_or_none(TOKENIZER)) is None or tokenizer is None:
        return
    where = model.folder.url_of(TOKENIZER)
    theirs = read_backend(content, where).get_vocab(with_added_tokens=True)
    ours = tokenizer.vocab if isinstance(tokenizer, JsonTokenizer) else {}
    size = 1 + max(theirs.values(), default=-1)  # further ones are added tokens
    others = [f": {quoted(token)} is {index}, there {theirs.get(token, 'missing')}" for token, index in ours.items()
              if theirs.get(token) != index and (token in theirs or index < size)]  # fmt: skip
    if not ours or others:
        raise ConfigError(
            f"init={source}: the data has another tokenizer{''.join(others[:1])}; prepare it with "
            f'tokenizer=TokenizerFile(path="{where}")'
        )
