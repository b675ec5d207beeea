"""A small decoder on a mesh, with random values in all parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxinfra.models.attention import Attention, AttentionTemperature
from jaxinfra.models.decoder import Cache, Transformer
from jaxinfra.models.delta_net import GatedDeltaNet
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.layers import MLP
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.ops.dot import dot
from jaxinfra.ops.rope import LinearScaling, Rope, YarnScaling
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import ParamSpec
from tests.decoders import changed, decoder

BASE = decoder(vocab_size=32, num_layers=3, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)
ONE = MeshConfig(fsdp=1)
LATENT = LatentAttention(
    num_heads=4,
    kv_lora_rank=8,
    q_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=10,
    # One of two frequencies is kept, the other divided by 4 or half way to it.
    rope=Rope(theta=100.0, scaling=YarnScaling(factor=4.0, original_length=64, beta_fast=4.0, mscale_all_dim=0.5)),
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt-2": {
        "mlp_activation": "gelu",
        "norm_type": "layernorm",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "rope": None,
        "learned_positions": 12,
        "tie_embeddings": True,
        "num_kv_heads": None,
    },
    "gemma": {
        "mlp_activation": "geglu",
        "norm_offset": 1.0,
        "norms": "both",
        "qk_norm": "head",
        "windows": (3, 3, None),
        "softcap": 5.0,
        "query_scale": 0.2,
        "num_layers": 4,
        "rope": Rope(theta=1e6, scaling=LinearScaling(factor=8.0)),
        "window_rope": Rope(theta=50.0),
        "tie_embeddings": True,
        "scale_embeddings": True,
        "logit_softcap": 2.0,
    },
    "deepseek": {
        "num_layers": 5,
        "first_layers": (Layer(mixer=LATENT, mlp=MLP(dim=24)),) * 2,
        "mixer": LATENT,
        "mlp": MixtureOfExperts(
            dim=12,
            num_experts=8,
            top_k=3,
            num_shared_experts=1,
            score_function="sigmoid",
            routed_scaling_factor=1.5,
            num_groups=4,
            top_k_groups=2,
            bias_update_rate=0.1,
            balance_loss=0.3,
            z_loss=0.01,
        ),
    },
    "qwen3-next": {
        "num_layers": 2,
        "layers": (
            Layer(
                mixer=GatedDeltaNet(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=6),
                mlp=MLP(dim=24),
            ),
            Layer(
                mixer=Attention(
                    num_heads=4, num_kv_heads=2, head_dim=8, gate=True, qk_norm="head", rope=Rope(fraction=0.5)
                ),
                mlp=MLP(dim=24),
            ),
        ),
        "norm_offset": 1.0,
    },
    # Two kinds of layers: chunks, with sinks and biases as in GPT-OSS; and no positions, but a temperature, with norms
    # on the branch only and over all heads.
    "unlike": {
        "num_layers": 4,
        "layers": (
            Layer(
                mixer=Attention(num_heads=4, chunk=5, sinks=True, qkv_bias=True, out_bias=True),
                mlp=MixtureOfExperts(
                    dim=12,
                    activation="clamped_swiglu",
                    num_experts=4,
                    top_k=2,
                    router_bias=True,
                    bias=True,
                    num_shared_experts=1,
                    shared_gate=True,
                ),
            ),
            Layer(
                mixer=Attention(
                    num_heads=4,
                    num_kv_heads=2,
                    head_dim=8,
                    rope=None,
                    temperature=AttentionTemperature(scale=0.5, floor=3),
                    qk_norm="all",
                ),
                mlp=MLP(dim=16),
                norms="after",
            ),
        ),
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
}
"""Together they use nearly every option; "gemma" has those of Gemma 2 and 3, "deepseek" those of V3."""


def slow_but(*fast: str) -> list[Any]:
    """Returns the names of the models as parameters of a test; all but some are slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow(6)) for name in MODELS]


def random_tokens(rows: int = 2, length: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, (rows, length), dtype=np.int32)


@dataclass(frozen=True)
class BuiltDecoder:
    """A decoder on a mesh, without parameter values."""

    config: TransformerConfig
    partitioner: Partitioner
    mesh: Mesh
    graphdef: Any
    specs: dict[str, Any]

    def values(self, seed: int = 0) -> dict[str, Any]:
        """Draws values on the host that differ from the initial ones, for norms and biases too."""
        rng = np.random.default_rng(seed)
        offset = self.config.norm.offset

        def one(spec: ParamSpec) -> np.ndarray:
            noise = rng.normal(size=spec.shape)
            if spec.role == "norm":
                noise = 1.0 - offset + 0.3 * noise
            elif spec.role == "bias":
                noise = 0.3 * noise
            elif spec.role == "matrix":
                noise = noise * np.prod([spec.shape[d] for d in spec.in_dims]) ** -0.5
            return noise.astype(np.float32)

        return jax.tree.map(one, self.specs)

    def put(self, values: dict[str, Any]) -> dict[str, Any]:
        """Puts parameters on the mesh in their stored sharding."""

        def one(value: np.ndarray, spec: ParamSpec) -> jax.Array:
            return jax.device_put(value, NamedSharding(self.mesh, self.partitioner.stored_spec("", spec)))

        return jax.tree.map(one, values, self.specs)

    def put_rows(self, array: Any) -> jax.Array:
        """Puts `[B, T]` on the mesh."""
        return jax.device_put(array, NamedSharding(self.mesh, self.partitioner.spec("batch", "sequence")))

    def model(self, params: dict[str, Any]) -> Transformer:
        return nnx.merge(self.graphdef, nnx.State(params))

    @cached_property
    def forward(self) -> Callable[..., tuple[jax.Array, Cache | None]]:
        """Compiles `forward(params, tokens, positions, segments, cache, counts) -> (logits before the cap, cache)`."""

        def run(params, tokens, positions=None, segments=None, *, cache=None, counts=None):
            model = self.model(params)
            if cache is None:
                batch = {"inputs": tokens, "positions": positions, "segments": segments}
                factored = model({name: array for name, array in batch.items() if array is not None})
            else:
                factored, cache = model.decode(tokens, cache, counts)
            return dot(factored.hidden, factored.head).astype(jnp.float32), cache

        return jax.jit(run)

    def logits(self, values: dict[str, Any], *arrays: np.ndarray | None) -> np.ndarray:
        """Returns logits for tokens, and optional positions and segments."""
        with jax.set_mesh(self.mesh):
            placed = (None if a is None else self.put_rows(a) for a in arrays)
            return np.asarray(self.forward(self.put(values), *placed)[0])


class Applied:
    """A built model as objectives call it: `objective.Apply`."""

    partial_sums = False

    def __init__(self, built: BuiltDecoder):
        self._built = built

    def __call__(self, params: dict[str, Any], batch: Any, *, train: bool = True) -> Any:
        return self._built.model(params)(batch)


def build(
    mesh: MeshConfig = ONE,
    *,
    config: TransformerConfig = BASE,
    rules: ShardingRules | None = None,
    dtype: str = "float32",
    **changes: Any,
) -> BuiltDecoder:
    """Builds a decoder with changed options (see `tests.decoders`)."""
    config = changed(config, **changes)
    devices = make_mesh(mesh, jax.devices()[: int(np.prod(mesh.sizes))])
    partitioner = Partitioner(rules=rules or ShardingRules(), mesh=mesh, compute_dtype=jnp.dtype(dtype))
    graphdef, specs = nnx.split(config.build(partitioner))
    return BuiltDecoder(config, partitioner, devices, graphdef, nnx.to_pure_dict(specs))


def relative_error(actual: Any, expected: Any) -> float:
    """Returns the largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
