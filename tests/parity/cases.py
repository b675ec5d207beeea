"""Small runs that together use every feature which a mesh can get wrong, and what they compute on a mesh.

Heads, widths, lengths and rows divide by eight, so that each axis may have all devices.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxinfra.data.tokens import TokenData
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.optim.optimizers import AdamW, Optim
from jaxinfra.optim.schedules import Constant
from jaxinfra.parallel.mesh import AXES, MeshConfig, make_mesh, permuted
from jaxinfra.parallel.spec import ParamSpec
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run
from jaxinfra.tasks.causal_lm import CausalLM
from jaxinfra.train.loop import TrainConfig

VOCAB, ROWS, LENGTH = 64, 32, 16
TOLERANCE = 1e-5
"""Largest difference of an array, as a part of its largest value. Float32 sums in another order give 1e-6 here."""

SHUFFLED = (5, 2, 7, 0, 3, 6, 1, 4)
"""An order of eight devices in which no mesh axis follows the order of their ids."""

DOCUMENTS = Run(
    name="documents",
    model=TransformerConfig(
        vocab_size=VOCAB, layers=2, width=32, heads=16, kv_heads=8, head_dim=4, mlp_dim=64, qk_norm=True, tied=True
    ),
    task=CausalLM(loss_chunks=2, z_loss=1e-2),
    data=TokenData(store="none", seq_len=LENGTH, mask_documents=True),
    precision=Precision(compute="float32"),
    optim=Optim(
        # The first updates of Adam are g / (|g| + eps). Where g is nothing but rounding, a small eps makes of it
        # a whole step in a random direction. With an eps as large as the gradients the update is smooth in g.
        optimizer=AdamW(eps=0.1),
        schedule=Constant(),
        peak_lr=0.1,
        clip_norm=0.5,
        ema_decay=0.9,
    ),
    train=TrainConfig(steps=3, global_batch=ROWS),
)
"""Grouped heads, norms on queries and keys, a tied head, document masks, weights of zero, z-loss, two chunks."""

BIASES = replace(
    DOCUMENTS,
    name="biases",
    model=TransformerConfig(
        vocab_size=VOCAB,
        layers=3,
        width=32,
        heads=8,
        mlp_dim=64,
        mlp="gelu",
        norm="layernorm",
        post_norms=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        sights=("local", "global"),
        window=5,
        softcap=5.0,
        logit_softcap=3.0,
        learned_positions=LENGTH,
    ),
    task=CausalLM(loss_chunks=4),
    data=TokenData(store="none", seq_len=LENGTH, mask_documents=False),
)
"""Biases everywhere, layers of two sights, learned positions, soft caps, a head of its own, four chunks."""

RUNS = (DOCUMENTS, BIASES)


def meshes(devices: int) -> list[MeshConfig]:
    """Every way to spread so many devices over replica, fsdp and tensor."""
    sizes = itertools.product((1, 2, 4, 8), repeat=3)
    return [MeshConfig(replica=r, fsdp=f, tensor=t) for r, f, t in sizes if r * f * t == devices]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run on one mesh."""

    run: Run
    mesh: MeshConfig = MeshConfig(fsdp=1)
    accumulate: int = 1
    shuffled: bool = False

    def __str__(self) -> str:
        always = ("replica", "fsdp", "tensor")
        sizes = zip(AXES, self.mesh.sizes, strict=True)
        mesh = "-".join(f"{axis}{size}" for axis, size in sizes if size > 1 or axis in always)
        return f"{self.run.name}-{mesh}-by{self.accumulate}"

    def program(self) -> Program:
        mesh = make_mesh(self.mesh, jax.devices()[: math.prod(self.mesh.sizes)])
        train = replace(self.run.train, accumulate=self.accumulate)
        run = replace(self.run, mesh=self.mesh, train=train)
        return Program(run, permuted(mesh, SHUFFLED) if self.shuffled else mesh)


def batch_on_host(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """Random words; with documents, two a row that meet anywhere, and a third of the weights zero."""
    draw = np.random.default_rng(seed)
    words = draw.integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
    batch = {"inputs": words[:, :-1], "targets": words[:, 1:]}
    if run.data.mask_documents:
        cut, place = draw.integers(1, LENGTH + 1, (ROWS, 1)), np.arange(LENGTH)
        batch["segments"] = (place >= cut).astype(np.int32)
        batch["positions"] = np.where(place >= cut, place - cut, place).astype(np.int32)
        batch["weights"] = (draw.random((ROWS, LENGTH)) > 1 / 3).astype(np.float32)
    return batch


def values_on_host(specs: Any) -> Any:
    """Values for all parameters, norms and biases included, at which every gradient is well away from zero."""
    draw = np.random.default_rng(1)

    def one(spec: ParamSpec) -> np.ndarray:
        fan_in = math.prod(spec.shape[d] for d in spec.in_dims)
        spread = fan_in**-0.5 if spec.in_dims else 0.3
        return ((spec.role == "norm") + spread * draw.normal(size=spec.shape)).astype(np.float32)

    return jax.tree.map(one, specs)


def put(values: Any, like: Any) -> Any:
    """Host arrays on the devices, sharded like `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda value, a: jax.device_put(value, a.sharding), values, like)


def on_host(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by path."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def gradients(case: Case) -> dict[str, np.ndarray]:
    """Every gradient and every sum of the loss."""
    program = case.program()
    params = put(values_on_host(program.specs), program.params)
    with program.on_mesh:
        return on_host(program.gradients(params, put(batch_on_host(case.run), program.batch)))


def differences(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each array the largest difference, as a part of its largest value."""
    assert found.keys() == wanted.keys()
    return {path: float(np.abs(found[path] - one).max() / (np.abs(one).max() or 1)) for path, one in wanted.items()}


def too_different(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """The arrays that differ by more than `TOLERANCE`; NaN counts."""
    return {path: size for path, size in differences(found, wanted).items() if not size < TOLERANCE}
