"""Numbers that follow from a config, against counts made by hand."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxinfra.data.tokens import TokenData
from jaxinfra.models.adapter import Lora
from jaxinfra.models.attention import Attention
from jaxinfra.models.delta_net import GatedDeltaNet
from jaxinfra.models.flops import flops_per_token, matmul_params
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.mixer import visible_keys
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig, with_mesh_size
from jaxinfra.train.statistics import per_device_bytes, run_statistics, step_flops, units_per_step
from tests.decoders import changed, decoder
from tests.tiny_run import Tiny


def test_flops_by_hand() -> None:
    """Width 8, two heads of 4, one key/value head, MLP of 16, ten words, two layers, three tokens."""
    config = decoder(vocab_size=10, num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=1, mlp_dim=16)
    query, key, value, out = 8 * 8, 8 * 4, 8 * 4, 8 * 8
    gate, up, down = 8 * 16, 8 * 16, 16 * 8
    weights = 2 * (query + key + value + out + gate + up + down) + 8 * 10
    assert matmul_params(config) == weights
    # Token t sees t + 1 keys: scores and values are 2 FLOPs each a head feature, in 2 heads of 4, in 2 layers.
    forward = 2 * weights * 3 + 2 * 2 * (2 * 4) * 2 * (1 + 2 + 3)
    assert flops_per_token(config, 3) * 3 == 3 * forward


@pytest.mark.parametrize("frozen", [None, "nf4"])
def test_flops_of_an_adapter_by_hand(frozen: Any) -> None:
    """As above, with four experts of which a token chooses one: their queries, keys and the head get no gradients."""
    model = decoder(vocab_size=10, num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=1, mlp_dim=16)
    model = changed(model, mlp=MixtureOfExperts(dim=16, num_experts=4, top_k=1))
    adapter = Lora(rank=2, targets=("query", "up"), trained=("unembedding",))
    data, precision = TokenData(store="none", seq_len=3), Precision(frozen=frozen)
    train = TrainConfig(global_batch=1)
    run = Run(name="a", model=model, init="x", adapter=adapter, precision=precision, data=data, train=train)
    router, frozen_weights = 8 * 4, 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    adapters = 2 * (2 * (8 + 8) + 2 * (8 + 16))
    expected = 3 * (flops_per_token(model, 3) - 2 * (frozen_weights + 2 * router) + 6 * adapters)
    assert step_flops(Program(with_mesh_size(run, 1), abstract_mesh(MeshConfig(fsdp=1)))) == expected


def test_flops_of_latents_by_hand() -> None:
    """As above; latents of 4 and 6, heads of 3 features and 2 rotated ones, values of 5."""
    latent = LatentAttention(
        num_heads=2, kv_lora_rank=4, q_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=5
    )
    config = decoder(vocab_size=10, num_layers=2, hidden_size=8, mixer=latent, mlp_dim=16)
    query, shared, out = 8 * 6 + 6 * 2 * (3 + 2), 8 * 2, 2 * 5 * 8
    key_and_value = 8 * 4 + 4 * 2 * 3 + 4 * 2 * 5
    weights = 2 * (query + shared + key_and_value + out + 3 * 8 * 16) + 8 * 10
    assert matmul_params(config) == weights
    forward = 2 * weights * 3 + 2 * (2 * (3 + 2) + 2 * 5) * 2 * (1 + 2 + 3)
    assert flops_per_token(config, 3) * 3 == 3 * forward


def test_flops_of_a_gated_delta_net_by_hand() -> None:
    """As above; two key heads of 4, four value heads of 3, in whose states a token has three products of 4 x 3."""
    mixer = GatedDeltaNet(num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=3)
    config = decoder(vocab_size=10, num_layers=2, hidden_size=8, mixer=mixer, mlp_dim=16)
    query, key, value, gate, out, beta_and_decay = 8 * 8, 8 * 8, 8 * 12, 8 * 12, 12 * 8, 2 * 8 * 4
    weights = 2 * (query + key + value + gate + out + beta_and_decay + 3 * 8 * 16) + 8 * 10
    assert matmul_params(config) == weights
    assert flops_per_token(config, 3) == flops_per_token(config, 300) == 6 * weights + 6 * 2 * 4 * 3 * 4 * 3


def test_flops_of_options() -> None:
    base = {"vocab_size": 10, "num_layers": 4, "hidden_size": 8, "num_heads": 2, "mlp_dim": 16}
    plain = flops_per_token(decoder(**base), 6)
    assert flops_per_token(decoder(**base, tie_embeddings=True), 6) == plain
    assert flops_per_token(decoder(**base, learned_positions=6), 6) == plain
    gated = flops_per_token(decoder(**base, gate=True), 6)
    assert gated - plain == 6 * 4 * 8 * 8
    without_gate = flops_per_token(decoder(**base, mlp_activation="gelu"), 6)
    assert plain - without_gate == 6 * 4 * 8 * 16
    local = decoder(**base, windows=(2, None))
    chunked = decoder(**base, windows=(None, 4))
    chunked = replace(
        chunked, layers=(chunked.layers[0], replace(chunked.layers[1], mixer=Attention(num_heads=2, chunk=4)))
    )
    # In chunks of 4, the last two of six tokens see 1 and 2 keys instead of 5 and 6.
    assert plain - flops_per_token(chunked, 6) == pytest.approx(12 * 2 * 4 * 2 * (11 - 3) / 6)
    # Within a window of 2, six tokens see 1, 2, 2, 2, 2, 2 keys instead of 1 to 6; in two of four layers.
    assert visible_keys(6, 2) == pytest.approx(11 / 6)
    assert visible_keys(6, None) == visible_keys(6, 9) == pytest.approx(21 / 6)
    assert plain - flops_per_token(local, 6) == pytest.approx(12 * 2 * 4 * 2 * (21 - 11) / 6)


def test_flops_against_the_compiler() -> None:
    """Of one layer (a scan of one is unrolled), forward; norms and softmax come on top, and the whole square."""
    config = decoder(vocab_size=512, num_layers=1, hidden_size=128, num_heads=4, mlp_dim=512)
    batch, length = 2, 64
    graph, specs = nnx.split(config.build(Partitioner()))
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), nnx.to_pure_dict(specs))

    def forward(params: dict, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, nnx.State(params))
        return model({"inputs": tokens}).materialize()

    mesh = jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        cost = jax.jit(forward).lower(params, tokens).compile().cost_analysis()
    counted = flops_per_token(config, length) / 3 * batch * length
    assert cost is not None and cost["flops"] == pytest.approx(counted, rel=0.15)


def test_run_statistics(tiny: Tiny) -> None:
    run = with_mesh_size(tiny.loaded("mesh.tensor=2", "optim.ema_decay=0.9", "train.accumulate=2"), 8)
    program = Program(run, abstract_mesh(run.mesh))
    numbers = {name: value for name, (value, _) in run_statistics(program, train_units=1000).items()}
    packed = Program(replace(run, data=replace(run.data, packing="best_fit")), program.mesh)
    assert run_statistics(packed, train_units=1000, train_rows=48)["epochs"] == (2.0, "of 48 rows with 1,000 tokens")
    block = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert numbers["devices"] == 8
    assert numbers["parameters"] == 2 * 304 * 32 + 2 * block + 32
    assert numbers["parameters of blocks"] == 2 * block + 32
    assert units_per_step(program) == numbers["tokens a step"] == 8 * 32
    assert numbers["tokens"] == 12 * 8 * 32 and numbers["epochs"] == 12 * 8 * 32 / 1000
    assert numbers["samples a device"] == 2, "eight sequences over four shards; tensor shards share theirs"
    assert step_flops(program) == numbers["FLOPs a token"] * 8 * 32
    assert numbers["FLOPs"] == step_flops(program) * 12


def test_bytes_of_a_device(tiny: Tiny) -> None:
    """The largest part of an array that one device holds, which for even shards is each."""
    run = with_mesh_size(tiny.loaded("mesh.tensor=2", "optim.ema_decay=0.9"), 8)
    program = Program(run, abstract_mesh(run.mesh))
    matrices = 2 * 304 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    norms = 2 * 2 * 32 + 32
    found = per_device_bytes(program.state.params)
    assert matrices * 4 // 8 < found <= (matrices // 8 + norms) * 4
    assert per_device_bytes(program.state.ema) == found
    moments = per_device_bytes(program.state.opt_state)
    assert 2 * found <= moments <= 2 * found + 64, "two moments, and counters"
