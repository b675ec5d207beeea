"""Modules for multi-token prediction in published models: the key of their number, and the names of their tensors.

A folder may lack the tensors although its `config.json` names a number, since transformers does not save them. So what
a folder has is counted by its tensors.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice, takewhile
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.interop.rules import Rule, rule
from jaxinfra.models.transformer import MultiTokenPrediction, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class MtpNames:
    """How modules for multi-token prediction are published; `{layer}` stands for the index of a module's layer.

    Attributes:
        key: the key of their number in `config.json`.
        embedding_norm, hidden_norm, join, norm: names of the tensors around a module's layer, without ".weight".
        layer_prefix: begins the names of the layer's tensors.
        follows_layers: whether the layers are counted on from those of the model.
        copies: names of copies of the embedding and of the LM head.
        most: the largest number of modules.
        unused: the pattern of all their tensors, as in `Family.unused`.
    """

    key: str
    embedding_norm: str
    hidden_norm: str
    join: str
    norm: str
    layer_prefix: str
    follows_layers: bool
    copies: tuple[str, ...] = ()
    most: int | None = None
    unused: str

    def rules(self) -> Iterator[Rule]:
        """Yields the rules of what is around a module's layer."""
        for ours in ("embedding_norm", "hidden_norm", "norm"):
            yield rule(f"{getattr(self, ours)}.weight", f"{ours}.scale", "d -> d")
        yield rule(f"{self.join}.weight", "join.weight", "o i -> i o")

    def layers(self, model: TransformerConfig) -> tuple[int, ...]:
        """Returns the indices of the layers of a model's modules."""
        first = model.num_layers if self.follows_layers else 0
        return tuple(range(first, first + model.mtp_depths))

    def copy_rules(self, model: TransformerConfig) -> Iterator[Rule]:
        """Yields the rules of copies."""
        for layer in self.layers(model):
            for name in self.copies:
                is_head = "head" in name and not model.tie_embeddings
                ours, pattern = ("unembedding", "v d -> d v") if is_head else ("embedding", "v d -> v d")
                yield rule(f"{name}.weight".replace("{layer}", str(layer)), ours, pattern)

    def stored_in(self, model: TransformerConfig, tensors: Container[str]) -> TransformerConfig:
        """Returns a model with as many modules as a folder with these tensors has."""
        first = model.num_layers if self.follows_layers else 0
        named = (f"{self.join}.weight".replace("{layer}", str(first + index)) for index in count())
        return with_modules(model, sum(1 for _ in takewhile(tensors.__contains__, islice(named, self.most))))

    def read(self, keys: ModelJson, model: TransformerConfig) -> TransformerConfig:
        """Returns a model with the number of modules that its keys name."""
        return with_modules(model, keys.take_between(self.key, 0, self.most, default=0))

    def write(self, model: TransformerConfig) -> dict[str, Any]:
        """Returns the key of the number of modules; {} without any."""
        if self.most is not None and model.mtp_depths > self.most:
            raise ConfigError(f"mtp.depths={model.mtp_depths}: this family has {self.most}")
        return {self.key: model.mtp_depths} if model.mtp_depths else {}


def with_modules(model: TransformerConfig, depths: int) -> TransformerConfig:
    """Returns a model with so many modules, whose layer is like the last one of the model that has attention."""
    layers = model.all_layers
    layer = next((each for each in reversed(layers) if each.mixer.attention(model.hidden_size) is not None), layers[-1])
    return replace(model, mtp=MultiTokenPrediction(layer=layer, depths=depths) if depths else None)


_LAYER = "model.layers.{layer}."

DEEPSEEK = MtpNames(
    key="num_nextn_predict_layers",
    embedding_norm=f"{_LAYER}enorm",
    hidden_norm=f"{_LAYER}hnorm",
    join=f"{_LAYER}eh_proj",
    norm=f"{_LAYER}shared_head.norm",
    layer_prefix=_LAYER,
    follows_layers=True,
    copies=(f"{_LAYER}embed_tokens", f"{_LAYER}shared_head.head"),
    unused="model.layers.{num_layers}.*",
)
"""The names of DeepSeek V3 and GLM-4.5."""

QWEN = MtpNames(
    key="num_nextn_predict_layers",  # vLLM reads it; published files have none
    embedding_norm="mtp.pre_fc_norm_embedding",
    hidden_norm="mtp.pre_fc_norm_hidden",
    join="mtp.fc",
    norm="mtp.norm",
    layer_prefix="mtp.layers.{layer}.",
    follows_layers=False,
    most=1,
    unused="mtp.*",
)
"""The names of Qwen3-Next and Qwen3.5: all modules would share what is around their layers, and there is one."""
