"""Rotary positions in `config.json`: scaling of all types, and proportional ones, in both directions."""

import math
from dataclasses import replace
from typing import Any

from jaxinfra.errors import ConfigError, quoted
from jaxinfra.interop.config_json import Fields, ModelJson, write_fields
from jaxinfra.ops.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling

type Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling

LLAMA3_FIELDS: Fields = {
    "factor": ("factor", float),
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "original_length": ("original_max_position_embeddings", int),
}
YARN_FIELDS: Fields = {
    "factor": ("factor", float),
    "original_length": ("original_max_position_embeddings", int),
    "beta_fast": ("beta_fast", float),
    "beta_slow": ("beta_slow", float),
    "truncate": ("truncate", bool),
}


def read_rope(
    keys: ModelJson, kind: str | None = None, theta: float = 10000.0, partial: bool = False, scores: bool = False
) -> Rope:
    """Reads rotary positions; `theta` is the default, and `partial` says whether a part of a head may be rotated.

    `scores` says whether YaRN multiplies attention scores by `m(mscale_all_dim) ** 2`, as DeepSeek's attention does.
    Published files have `rope_theta` and `rope_scaling`; those of transformers 5 have both in `rope_parameters`, for
    models with two kinds of layers an object for each `kind`.
    """
    options = ModelJson({}, keys.where)
    for name in ("rope_scaling", "rope_parameters"):
        if name in keys:
            options = keys.part(name)
            options = options.part(kind) if kind is not None and kind in options else options
    keys.ignore("rope_scaling", "rope_parameters")
    theta = options.take("rope_theta", float, keys.take("rope_theta", float, theta))
    fraction = options.take("partial_rotary_factor", float, keys.take("partial_rotary_factor", float, 1.0))
    proportional = options.take("rope_type", str, "default") == "proportional"
    if fraction != 1 and not (partial or proportional):
        raise ConfigError(f"{keys.where}: partial_rotary_factor is {fraction}; this family has none but 1")
    scaling = None if proportional else _read_scaling(options, keys, scores)
    rope = Rope(theta=theta, fraction=fraction, scaling=scaling, proportional=proportional)
    options.ignore("mrope_section", "mrope_interleaved")  # of a text all three positions are the same
    options.close()
    return rope


def _read_scaling(keys: ModelJson, model: ModelJson, scores: bool) -> Scaling | None:
    """Reads scaling from its own keys and those of the model."""
    kind = keys.take("rope_type", str, keys.take("type", str, "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=keys.take("factor", float))
        case "llama3":
            return Llama3Scaling(**keys.take_fields(LLAMA3_FIELDS))
        case "yarn":
            return _read_yarn(keys, model, scores)
        case "longrope" | "su":
            return _read_longrope(keys, model)
        case _:
            known = "default, linear, llama3, yarn, longrope, su or proportional"
            raise ConfigError(f"{keys.where}: rope_type={quoted(repr(kind))} is not supported; use {known}")


def _read_yarn(keys: ModelJson, model: ModelJson, scores: bool) -> YarnScaling:
    """Reads YaRN; the factor on cosines and sines is `attention_factor`, or from both mscales, or `m(1)`."""
    original = keys.take("original_max_position_embeddings", int, model.optional("max_position_embeddings", int))
    if "factor" not in keys:
        keys.default(factor=model.take("max_position_embeddings", int) / original)
    defaults = {"original_length": original, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    yarn = YarnScaling(**keys.take_fields(YARN_FIELDS, **defaults))
    mscale, all_dim = (keys.take(name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    if yarn.factor <= 1:  # then m is 1 for all weights
        keys.require("attention_factor", 1, default=1)
        return yarn
    on_table = yarn.m(mscale) / yarn.m(all_dim) if mscale and all_dim else yarn.m(1)
    on_table, on_scores = keys.take("attention_factor", float, on_table), all_dim if scores else 0.0
    mscale = (on_table * yarn.m(on_scores) - 1) / (0.1 * math.log(yarn.factor))  # so that `table_scale` is `on_table`
    return replace(yarn, mscale=round(mscale, 9), mscale_all_dim=on_scores)


def _read_longrope(keys: ModelJson, model: ModelJson) -> LongRopeScaling:
    """Reads LongRoPE: "long_factor", and "short_factor" for documents up to the original length."""
    longest = model.take("max_position_embeddings", int)
    original = keys.take("original_max_position_embeddings", int, longest)
    original = model.take("original_max_position_embeddings", int, original)
    keys.require("attention_factor", None)
    lists = [keys.take(name, list) for name in ("long_factor", "short_factor")]
    if original < 2 or not all(isinstance(each, (int, float)) for each in sum(lists, [])):
        expected = "long_factor and short_factor must be lists of numbers, and the original length at least 2"
        raise ConfigError(f"{keys.where}: {expected}")
    long, short = (tuple(map(float, each)) for each in lists)
    factor = keys.take("factor", float, max(longest / original, 1.0))
    short = () if short == long else short
    return LongRopeScaling(divisors=long, short_divisors=short, factor=factor, original_length=original)


def write_rope(rope: Rope | None) -> dict[str, Any]:
    """Returns the keys of rotary positions, in the form of published files."""
    if rope is None:
        return {}
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1:
        keys["partial_rotary_factor"] = rope.fraction
    if rope.proportional:
        keys["rope_scaling"] = {"rope_type": "proportional"}
    match rope.scaling:
        case LinearScaling(factor=factor):
            keys["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            keys["rope_scaling"] = {"rope_type": "llama3"} | write_fields(scaling, LLAMA3_FIELDS)
        case YarnScaling() as scaling:
            keys["max_position_embeddings"] = round(scaling.factor * scaling.original_length)
            keys["rope_scaling"] = _write_yarn(scaling)
        case LongRopeScaling() as scaling:
            keys["max_position_embeddings"] = round(scaling.factor * scaling.original_length)
            keys["rope_scaling"] = {
                **dict.fromkeys(("type", "rope_type"), "longrope"),  # engines look for either
                "long_factor": [*scaling.divisors],
                "short_factor": [*(scaling.short_divisors or scaling.divisors)],
                "original_max_position_embeddings": scaling.original_length,
            }
    return keys


def _write_yarn(scaling: YarnScaling) -> dict[str, Any]:
    keys = {"rope_type": "yarn"} | write_fields(scaling, YARN_FIELDS)
    if scaling.mscale_all_dim:
        return keys | {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return keys if scaling.mscale == 1 else keys | {"attention_factor": scaling.m(scaling.mscale)}
