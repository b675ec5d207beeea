"""GLM-4.5 and GLM-4.5-Air (GLM-4.5 team 2025): attention with a rotated half, and DeepSeek's experts."""

from functools import partial
from typing import Any

from jaxinfra.families import mtp
from jaxinfra.families.common import Family, attention_of, mlp_or_experts_rules, read_attention, read_model, write_model
from jaxinfra.families.experts import read_routed, routed_experts, routed_shape, write_routed
from jaxinfra.families.rotary import read_rope
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.transformer import TransformerConfig
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
    return mtp.DEEPSEEK.read(keys, read_model(keys, mixer, read_routed(keys)))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a GLM-4.5."""
    mixer = attention_of(model)[0]
    keys = {"attention_bias": mixer.qkv_bias, "use_qk_norm": mixer.qk_norm == "head"}
    return {"partial_rotary_factor": 1.0} | write_model(model) | write_routed(model) | keys


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read=read,
    write=write,
    mlp_rules=partial(mlp_or_experts_rules, shared="mlp.shared_experts"),
    mtp=mtp.DEEPSEEK,
)


_attention = partial(
    Attention, num_heads=96, num_kv_heads=8, head_dim=128, qkv_bias=True, rope=Rope(theta=1e6, fraction=0.5)
)
_shape = partial(routed_shape, vocab_size=151552)

SHAPES = {
    "glm-4.5": _shape(
        num_layers=92,
        hidden_size=5120,
        num_dense=3,
        mlp_dim=12288,
        mixer=_attention(qk_norm="head"),
        experts=routed_experts(dim=1536, num_experts=160, routed_scaling_factor=2.5),
    ),
    "glm-4.5-air": _shape(
        num_layers=46,
        hidden_size=4096,
        num_dense=1,
        mlp_dim=10944,
        mixer=_attention(),
        experts=routed_experts(dim=1408, num_experts=128),
    ),
}
"""zai-org/GLM-4.5 and GLM-4.5-Air, without modules for multi-token prediction."""
