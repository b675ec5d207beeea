"""The shapes of published models by name, and two small ones for tests and benchmarks.

They are in the files of this package. Every number is from the `config.json` published with the weights, under the
name in the comment of each family. Number formats, dropout and context lengths belong to the run. Vocabularies are as
published, with their padding, so that parameter counts are exact; a mesh with `tensor` above 1 may need a `vocab_size`
that is a multiple of `tensor`.
"""

from collections.abc import Mapping
from functools import partial

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError
from jaxinfra.families.common import decoder
from jaxinfra.families.registry import family_modules
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.models.vit import VisionTransformerConfig

# ViT-{S,B,L}/16 for ImageNet-1k at 224 pixels (Dosovitskiy et al. 2021; S: Touvron et al. 2021)
_vit = partial(VisionTransformerConfig, image_size=224, patch_size=16, num_classes=1000)

SHAPES: dict[str, TransformerConfig] = {
    # Like Llama, for tests and benchmarks; not published.
    "tiny": decoder(vocab_size=256, num_layers=2, hidden_size=64, num_heads=4, mlp=128),
    "small": decoder(vocab_size=8192, num_layers=4, hidden_size=256, num_heads=8, mlp=1024),
    **{name: config for module in family_modules() for name, config in module.SHAPES.items()},
}
"""Decoders by name."""

VISION_SHAPES: dict[str, VisionTransformerConfig] = {
    "vit-s16": _vit(num_layers=12, hidden_size=384, num_heads=6, mlp_dim=1536),
    "vit-b16": _vit(num_layers=12, hidden_size=768, num_heads=12, mlp_dim=3072),
    "vit-l16": _vit(num_layers=24, hidden_size=1024, num_heads=16, mlp_dim=4096),
}
"""Image classifiers by name."""


def shape(name: str) -> TransformerConfig:
    """Returns a decoder by name; raises ConfigError for an unknown one. Change fields with `dataclasses.replace`."""
    return _find(name, SHAPES, "shape", "tiny")


def vision_shape(name: str) -> VisionTransformerConfig:
    """Returns an image classifier by name; raises ConfigError for an unknown one."""
    return _find(name, VISION_SHAPES, "vision_shape", "vit-b16")


_OTHER_NAMES = {"gpt2-small": "gpt2", "gpt2-124m": "gpt2", "gpt2-1.5b": "gpt2-xl", "llama3-8b": "llama-3.1-8b"}


def _find[S](name: str, shapes: Mapping[str, S], function: str, example: str) -> S:
    if name not in shapes:
        other = _OTHER_NAMES.get(name)
        near = other if other in shapes else nearest(name.lower(), shapes, cutoff=0.4) or example
        raise ConfigError(f'zoo.{function}("{name}"): there is no such model; did you mean "{near}"?')
    return shapes[name]
