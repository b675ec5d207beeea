"""GLM-4.5 and GLM-4.5-Air (GLM-4.5 team 2025): attention with a rotated half, and DeepSeek's experts.

Layers for the prediction of several tokens are not read.
"""

from functools import partial
from typing import Any

from jaxinfra.families.common import (
    Family,
    layer_rules,
    mlp_or_experts_rules,
    of_kind,
    read_attention,
    read_model,
    read_rope,
    write_model,
)
from jaxinfra.families.routed import BALANCE, read_layers, write_layers
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.rope import Rope


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a GLM-4.5."""
    keys.default(partial_rotary_factor=0.5, rms_norm_eps=1e-5, num_key_value_heads=8)
    keys.default(n_group=1, topk_group=1, routed_scaling_factor=1.0, first_k_dense_replace=1)
    mixer = read_attention(
        keys,
        rope=read_rope(keys, partial=True),
        qkv_bias=keys.take("attention_bias", bool, False),
        qk_norm="head" if keys.take("use_qk_norm", bool, False) else None,
    )
    return read_model(keys, read_layers(keys, mixer))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a GLM-4.5."""
    mixer = of_kind(model.layers[0].mixer, Attention, "layers.0.mixer")
    keys = {"attention_bias": mixer.qkv_bias, "use_qk_norm": mixer.qk_norm == "head"}
    return {"partial_rotary_factor": 1.0} | write_model(model) | write_layers(model) | keys


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read=read,
    write=write,
    layer_rules=partial(layer_rules, feed_forward=partial(mlp_or_experts_rules, shared="mlp.shared_experts")),
    unused=("*rotary_emb.inv_freq", "*lm_head.weight", "model.layers.{num_layers}.*"),
)


def _shape(
    num_layers: int, hidden_size: int, num_dense: int, mlp_dim: int, qk_norm: bool, **options: Any
) -> TransformerConfig:
    mixer = Attention(
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        qkv_bias=True,
        qk_norm="head" if qk_norm else None,
        rope=Rope(theta=1e6, fraction=0.5),
    )
    experts = MixtureOfExperts(top_k=8, num_shared_experts=1, score_function="sigmoid", **BALANCE, **options)
    return TransformerConfig(
        vocab_size=151552,
        num_layers=num_layers,
        hidden_size=hidden_size,
        first_layers=(Layer(mixer=mixer, mlp=MLP(dim=mlp_dim)),) * num_dense,
        layers=(Layer(mixer=mixer, mlp=experts),),
    )


SHAPES = {
    "glm-4.5": _shape(
        num_layers=92,
        hidden_size=5120,
        num_dense=3,
        mlp_dim=12288,
        qk_norm=True,
        dim=1536,
        num_experts=160,
        routed_scaling_factor=2.5,
    ),
    "glm-4.5-air": _shape(
        num_layers=46, hidden_size=4096, num_dense=1, mlp_dim=10944, qk_norm=False, dim=1408, num_experts=128
    ),
}
"""zai-org/GLM-4.5 and GLM-4.5-Air, without layers for the prediction of several tokens."""
