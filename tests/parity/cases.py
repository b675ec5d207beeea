"""Small runs that together use every feature that a mesh could break, and their results on a mesh.

Heads, hidden sizes, lengths and rows are divisible by eight, so that each axis can have all devices.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxinfra.config import validate
from jaxinfra.data.image_data import ImageData
from jaxinfra.data.tokens import TokenData
from jaxinfra.models.attention import AttentionTemperature
from jaxinfra.models.delta_net import GatedDeltaNet
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.layers import MLP, NormConfig
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.objectives.classification import Classification
from jaxinfra.ops.rope import LongRopeScaling, Rope, YarnScaling
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.optimizers import AdamW
from jaxinfra.optim.schedules import Constant
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.parallel.spec import ParamSpec
from jaxinfra.parity.meshes import (
    Arrays,
    loss_and_gradients,
    make_program,
    put_like,
    random_batch,
    relative_differences,
)
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import changed, decoder

VOCAB, ROWS, LENGTH, STEP = 64, 32, 16, 3
TOLERANCE = 1e-5
"""Largest difference of an array relative to its largest value. Another order of float32 sums gives 1e-6 here."""

SHUFFLED = (5, 2, 7, 0, 3, 6, 1, 4)
"""An order of eight devices in which no mesh axis follows the order of their ids."""

DOCUMENTS = Run(
    name="documents",
    model=decoder(
        vocab_size=VOCAB,
        num_layers=2,
        hidden_size=32,
        num_heads=16,
        num_kv_heads=8,
        head_dim=4,
        mlp_dim=64,
        qk_norm="head",
        tie_embeddings=True,
    ),
    objective=CausalLM(loss_chunks=2, z_loss=1e-2),
    data=TokenData(store="none", seq_len=LENGTH, mask_documents=True),
    precision=Precision(compute="float32"),
    optim=OptimConfig(
        # Adam's first update is g / (|g| + eps). If g is only rounding error, a small eps makes it a full step in a
        # random direction. With an eps as large as the gradients, the update is smooth in g.
        optimizer=AdamW(eps=0.1),
        schedule=Constant(),
        peak_lr=0.1,
        clip_norm=0.5,
        ema_decay=0.9,
    ),
    train=TrainConfig(steps=3, global_batch=ROWS),
)
"""Grouped-query attention, query and key norms, a tied head, document masks, zero weights, z-loss, two loss chunks."""

BIASES = replace(
    DOCUMENTS,
    name="biases",
    model=decoder(
        vocab_size=VOCAB,
        num_layers=4,
        hidden_size=32,
        num_heads=8,
        mlp_dim=64,
        mlp_activation="gelu",
        norm_type="layernorm",
        norms="both",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        windows=(5, None),
        softcap=5.0,
        query_scale=0.7,
        logit_softcap=3.0,
        learned_positions=LENGTH,
    ),
    objective=CausalLM(loss_chunks=4),
    data=TokenData(store="none", seq_len=LENGTH, mask_documents=False),
)
"""Biases, a period of two layers, learned positions, soft caps, an untied head, four loss chunks."""

# In four layers of DOCUMENTS, all 4 features of some head are near zero: their norm amplifies another order of sums to
# 2e-5, on one device too. With 8 features it does not.
DEEP = replace(DOCUMENTS, name="deep", model=changed(DOCUMENTS.model, num_layers=4, head_dim=8))

DROPPING = replace(BIASES, name="dropping", model=replace(BIASES.model, dropout=0.2), objective=CausalLM(loss_chunks=2))

LATENT = replace(
    DOCUMENTS,
    name="latent",
    model=changed(
        DOCUMENTS.model,
        mixer=LatentAttention(
            num_heads=8,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=10,
            rope=Rope(
                theta=100.0, scaling=YarnScaling(factor=4.0, original_length=64, beta_fast=4.0, mscale_all_dim=1.0)
            ),
        ),
    ),
)
"""Latent attention."""

TIGHT = replace(
    DOCUMENTS,
    name="tight",
    model=changed(
        DOCUMENTS.model,
        dropout=0.1,
        mlp=MixtureOfExperts(
            dim=16,
            num_experts=8,
            top_k=3,
            num_shared_experts=1,
            shared_gate=True,
            router_bias=True,
            bias=True,
            score_function="sigmoid",
            routed_scaling_factor=1.5,
            num_groups=4,
            top_k_groups=2,
            bias_update_rate=0.05,
            capacity_factor=1.1,
            balance_loss=0.5,
            z_loss=0.01,
        ),
    ),
)
"""All options of experts; some experts reach their capacity in every sequence."""

LOOSE = replace(
    DOCUMENTS,
    name="loose",
    model=changed(
        DOCUMENTS.model,
        chunk=5,
        qk_norm="l2",
        temperature=AttentionTemperature(scale=0.5, floor=3),
        mlp=MixtureOfExperts(dim=64, activation="gelu", num_experts=8, top_k=2, scale_inputs=True, balance_loss=0.1),
    ),
)
"""Mixtral's experts, with softmax scores and no capacity; of Llama 4 chunks, the temperature, and scores that multiply
the inputs of experts."""

DENSE_LAYER = Layer(mixer=replace(DOCUMENTS.model.layers[0].mixer, window=5), mlp=MLP(dim=64), norms="after")
DELTA_LAYER = Layer(
    mixer=GatedDeltaNet(num_key_heads=8, num_value_heads=16, key_head_dim=6, value_head_dim=4), mlp=MLP(dim=64)
)
BY_LENGTH = LongRopeScaling(divisors=(1.0, 4.0), short_divisors=(1.0, 1.5), original_length=6)
GATED_MIXER = replace(
    DOCUMENTS.model.layers[0].mixer, sinks=True, qk_norm="all", gate=True, rope=Rope(scaling=BY_LENGTH)
)
PERIODS = replace(
    TIGHT,
    name="periods",
    model=replace(
        TIGHT.model,
        num_layers=7,
        first_layers=(DENSE_LAYER,),
        layers=(replace(TIGHT.model.layers[0], mixer=GATED_MIXER), DELTA_LAYER),
        norm=NormConfig(eps=0.01),  # outputs of the recurrence may be near zero: their norm would amplify rounding
    ),
)
"""Three periods of unlike layers, gated attention with sinks, experts and a LongRoPE by the length of a document, and a
gated delta net with an MLP, after a dense layer with a window: uneven over two stages."""

DEEPSEEK = replace(
    TIGHT,
    name="deepseek",
    model=replace(
        LATENT.model,
        num_layers=3,
        first_layers=LATENT.model.layers,
        layers=(replace(LATENT.model.layers[0], mlp=TIGHT.model.layers[0].mlp),),
        dropout=0.1,
    ),
)
"""DeepSeek-V3: latent attention, a dense first layer, grouped sigmoid scores with biases, a shared expert."""

SHAPE = VisionTransformerConfig(
    image_size=8, patch_size=2, channels=1, num_classes=5, num_layers=3, hidden_size=32, num_heads=8, mlp_dim=64
)
TOKEN = replace(
    DOCUMENTS,
    name="token",
    model=SHAPE,
    objective=Classification(),
    data=ImageData(store="none", image_size=8, channels=1),
)
"""Images with a class token: 17 positions, which no mesh divides; three layers are uneven over two stages."""

MEAN = replace(
    TOKEN,
    name="mean",
    model=replace(SHAPE, pool="mean", num_layers=4, dropout=0.2),
    objective=Classification(label_smoothing=0.2),
)
"""Images of 16 positions, sharded over tensor between layers; dropout and label smoothing."""

RUNS = {run.name: run for run in (DEEP, DROPPING, LATENT, TIGHT, LOOSE, PERIODS, DEEPSEEK, TOKEN, MEAN)}
NO_GRADIENT = "grad.blocks.attention.key.bias"
"""For images: a bias on keys adds the same to all scores of a query, so it has no effect and no gradient."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run on one mesh, in a number of microbatches."""

    run: Run
    mesh: MeshConfig = MeshConfig(fsdp=1)
    accumulate: int = 1
    shuffled: bool = False

    def __str__(self) -> str:
        axes = [f"{axis}{size}" for axis, size in zip(AXES, self.mesh.sizes, strict=True) if size > 1]
        return "-".join([self.run.name, *axes, f"by{self.accumulate}", *["shuffled"][: self.shuffled]])

    def program(self) -> Program:
        run = replace(self.run, mesh=self.mesh, train=replace(self.run.train, accumulate=self.accumulate))
        validate(run)
        return make_program(run, SHUFFLED if self.shuffled else None)


def batch_on_host(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """Random samples of a run; some weights are zero."""
    if not isinstance(run.data, ImageData):
        return random_batch(run, seed)
    draw = np.random.default_rng(seed)
    return {
        "images": draw.normal(size=(ROWS, 8, 8, 1)).astype(np.float32),
        "labels": draw.integers(0, SHAPE.num_classes, ROWS, dtype=np.int32),
        "weights": (draw.random(ROWS) > 1 / 3).astype(np.float32),
    }


def values_on_host(specs: Any) -> Any:
    """Values for all parameters, also norms and biases, for which no gradient is near zero."""
    draw = np.random.default_rng(1)

    def value(spec: ParamSpec) -> np.ndarray:
        fan_in = math.prod(spec.shape[d] for d in spec.in_dims)
        stddev = fan_in**-0.5 if spec.in_dims else 0.3
        return ((spec.role == "norm") + stddev * draw.normal(size=spec.shape)).astype(np.float32)

    return jax.tree.map(value, specs)


def on_host(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves by path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def gradients(case: Case, step: int = STEP) -> Arrays:
    """Computes every gradient and every sum of the loss, with the dropout masks of a step."""
    program = case.program()
    return loss_and_gradients(program, batch_on_host(case.run), values_on_host(program.specs), step)


@functools.cache
def on_one_device(run: Run) -> Arrays:
    """Computes the gradients of a run on one device in one batch; cached."""
    return gradients(Case(run=run))


@functools.cache
def one_device_program(run: Run) -> Program:
    """Returns the program of `on_one_device`."""
    return Case(run=run).program()


def evaluated(case: Case) -> Arrays:
    """Computes every sum of an evaluation."""
    program, batch = case.program(), batch_on_host(case.run)
    expected = program.batch if batch.keys() == program.batch.keys() else program.validation_batch
    with program.on_mesh:
        placed = put_like(values_on_host(program.specs), program.params)
        return on_host(program.eval_step(placed, put_like(batch, expected)))


def too_different(found: Arrays, wanted: Arrays) -> dict[str, float]:
    """Returns the arrays that differ by `TOLERANCE` or more, or are NaN."""
    return {path: size for path, size in relative_differences(found, wanted).items() if not size < TOLERANCE}


def near_zero(found: Arrays) -> set[str]:
    """Returns the arrays that are too small for a relative difference."""
    return {path for path, one in found.items() if np.abs(one).max() < 1e-3 and path not in ("sum.z_loss", NO_GRADIENT)}
