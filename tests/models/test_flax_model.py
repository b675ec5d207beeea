"""Plain Flax modules as models: their numbers are those of Flax alone, on any mesh; their state is kept."""

import inspect
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import validate
from jaxinfra.data.image_data import ImageData
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.flax_model import FlaxModel
from jaxinfra.objectives.classification import Classification
from jaxinfra.optim.config import OptimConfig
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import ParamSpec
from jaxinfra.parity.meshes import Arrays, loss_and_gradients, make_program, put_like
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.parity.cases import on_host, too_different
from tests.refusals import raises, refused
from tests.tiny_run import Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

VOCAB, LENGTH, ROWS, WIDTH = 64, 16, 16, 32
ONE = MeshConfig(fsdp=1)
CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)


class Net(nnx.Module):
    """Every kind of variable: annotated kernels, others, state of floats and integers, random streams."""

    def __init__(self, dropout: float, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, rngs=rngs)
        annotated = partial(nnx.with_partitioning, nnx.initializers.lecun_normal())
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, 3, padding="CAUSAL", rngs=rngs)
        self.batch_norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.mlp = nnx.List(
            [
                linear(WIDTH, 2 * WIDTH, kernel_init=annotated(("embed", "mlp"))),
                linear(2 * WIDTH, WIDTH, kernel_init=annotated(("tensor", "fsdp"))),
            ]
        )
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = linear(WIDTH, VOCAB)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        self.calls[...] += 1
        x = self.embed(tokens)
        x = x + self.dropout(nnx.relu(self.batch_norm(self.conv(x))))
        x = x + self.mlp[1](nnx.gelu(self.mlp[0](x)))
        return self.head(self.norm(x))


@dataclass(frozen=True, kw_only=True)
class Plain(FlaxModel):
    dropout: float = 0.0

    def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
        return Net(self.dropout, rngs)


class Linen(linen.Module):
    """A module of the older interface, with names of logical and of mesh axes, running averages and dropout."""

    @linen.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        init = linen.initializers.lecun_normal()
        annotated = linen.with_logical_partitioning(init, ("embed", "mlp"))
        x = linen.Embed(VOCAB, WIDTH)(tokens)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(WIDTH, kernel_init=annotated)(x))
        x = linen.Dropout(0.5 if train else 0.0, deterministic=not train)(x)
        return linen.Dense(VOCAB, kernel_init=linen.with_partitioning(init, ("tensor", "fsdp")))(x)


@dataclass(frozen=True, kw_only=True)
class Bridged(FlaxModel):
    def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.bridge.ToNNX(Linen(), rngs=rngs).lazy_init(jnp.zeros((1, LENGTH), jnp.int32))

    def call(self, module: Any, batch: Mapping[str, jax.Array], *, train: bool) -> Any:
        return module(batch["inputs"], train=train, mutable=["batch_stats"] if train else False)


RUN = Run(
    name="plain",
    model=Plain(),
    data=TokenData(store="none", seq_len=LENGTH, mask_documents=False),
    precision=Precision(compute="float32"),
    train=TrainConfig(steps=3, global_batch=ROWS),
)


def program(model: FlaxModel, mesh: MeshConfig = ONE, accumulate: int = 1, run: Run = RUN) -> Program:
    run = replace(run, model=model, mesh=mesh, train=replace(run.train, accumulate=accumulate))
    validate(run)
    return make_program(run)


def declared(model: FlaxModel, mesh: MeshConfig = ONE, run: Run = RUN) -> Program:
    """A program that is never run."""
    run = replace(run, model=model, mesh=mesh)
    validate(run)
    return Program(run, abstract_mesh(mesh))


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def fresh(model: FlaxModel) -> Any:
    """The module as Flax alone makes it."""
    with nnx.use_eager_sharding(False):
        return model.make_module(nnx.Rngs(RUN.seed))


def variables(module: Any) -> Arrays:
    return on_host({"module": nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))})


def in_flax(microbatches: int) -> tuple[Arrays, Arrays]:
    """Gradients of the mean loss, and the state after the step, by Flax alone; state is averaged over microbatches."""
    gradients, states = [], []

    @nnx.jit
    def step(module: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        def loss(module: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(module(inputs), targets).mean()

        return nnx.grad(loss)(module)

    for first_row in range(microbatches):
        rows, module = slice(first_row, None, microbatches), fresh(Plain())
        module.train()
        found = step(module, batch()["inputs"][rows], batch()["targets"][rows])
        gradients.append({f"grad.{path}": x for path, x in on_host({"module": nnx.to_pure_dict(found)}).items()})
        states.append(variables(module))
    mean = [{path: np.mean([one[path] for one in every], axis=0) for path in every[0]} for every in (gradients, states)]
    return mean[0], {path: x for path, x in mean[1].items() if f"grad.{path}" not in mean[0]}


def buffers(built: Program, found: Arrays) -> Arrays:
    """The state after a step, from the statistics of the step."""
    stats = {path.removeprefix("sum."): jnp.asarray(x) for path, x in found.items() if path.startswith("sum.")}
    with built.on_mesh:
        params = built.init(jax.random.key(built.run.seed)).params
        return on_host(built.model(params).update_buffers(stats))


# Numbers


@pytest.mark.parametrize("mesh", [ONE, CUBE], ids=["one", "cube"])
def test_first_values_are_those_that_flax_gives(mesh: MeshConfig) -> None:
    built = program(Plain(), mesh)
    with built.on_mesh:
        found = on_host(built.init(jax.random.key(RUN.seed)).params)
    wanted = variables(fresh(Plain()))
    assert found.keys() == wanted.keys()
    for path, one in wanted.items():
        assert found[path].dtype == one.dtype, path
        np.testing.assert_allclose(found[path], one, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        pytest.param(CUBE, 1, id="cube", marks=pytest.mark.jax_range),
        pytest.param(MeshConfig(fsdp=8), 1, id="fsdp"),
        pytest.param(MeshConfig(replica=2, fsdp=4), 2, id="replica-by2"),
    ],
)
def test_gradients_and_state_are_those_of_flax_on_one_device(mesh: MeshConfig, accumulate: int) -> None:
    """Batch statistics are over all rows of a microbatch, wherever they are."""
    built = program(Plain(), mesh, accumulate)
    found = loss_and_gradients(built, batch())
    gradients, state = in_flax(accumulate)
    # What comes before batch normalization cannot shift it: no gradient, but of rounding.
    none = "grad.module.conv.bias"
    assert np.abs(found.pop(none)).max() < 1e-6 and np.abs(gradients.pop(none)).max() < 1e-6
    assert {path for path in found if path.startswith("grad.")} == gradients.keys()
    assert too_different({path: found[path] for path in gradients}, gradients) == {}
    assert too_different(buffers(built, found), state) == {}
    assert state["module.calls"] == 1


def test_a_linen_module_trains_through_the_bridge() -> None:
    """With its annotations and running averages; the same masks on a mesh."""
    wanted, built = loss_and_gradients(program(Bridged()), batch()), program(Bridged(), CUBE)
    shardings = [str(built.params["module"][name]["kernel"].sharding.spec) for name in ("Dense_0", "Dense_1")]
    assert shardings == ["P('fsdp', 'tensor')", "P('tensor', 'fsdp')"]
    found = loss_and_gradients(built, batch())
    none = "grad.module.Dense_0.bias"
    assert np.abs(found.pop(none)).max() < 1e-4 and np.abs(wanted.pop(none)).max() < 1e-4
    assert too_different(found, wanted) == {}
    assert np.abs(buffers(built, found)["module.BatchNorm_0.mean"]).max() > 0


# Random numbers, state and precision, by single calls


def logits(built: Program, step: int | None, **fields: Any) -> jax.Array:
    """The result of a call in training of a step, or in evaluation; of row 0."""
    with built.on_mesh:
        params = jax.tree.map(jnp.asarray, built.init(jax.random.key(RUN.seed)).params)
        arrays = put_like(batch(), built.batch)
        if step is not None:
            arrays = built.with_dropout_bits(arrays, step)
        return jax.jit(lambda params, arrays: built.model(params)(arrays))(params, arrays)


def test_dropout_is_drawn_anew_in_each_step_the_same_on_any_mesh_and_not_in_evaluation() -> None:
    dropping, cube = program(Plain(dropout=0.5)), program(Plain(dropout=0.5), CUBE)
    first, again, other = (np.asarray(logits(dropping, step)) for step in (3, 3, 4))
    assert np.array_equal(first, again) and np.abs(first - other).max() > 0.1
    np.testing.assert_allclose(np.asarray(logits(cube, 3)), first, atol=1e-5)
    module = fresh(Plain())
    module.eval()
    np.testing.assert_allclose(np.asarray(logits(dropping, None)), module(jnp.asarray(batch()["inputs"])), atol=1e-5)


class Averages(nnx.Module):
    """Batch normalization of pixels."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(64, momentum=0.75, epsilon=0.0, use_bias=False, use_scale=False, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((64,)))

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.norm(images.reshape(len(images), 64)) * self.scale


@dataclass(frozen=True, kw_only=True)
class OfImages(FlaxModel):
    def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
        return Averages(rngs)


def test_running_averages_are_those_of_numpy_and_are_used_in_evaluation() -> None:
    run = replace(RUN, objective=Classification(), data=ImageData(store="none", image_size=8, channels=1))
    built = program(OfImages(), MeshConfig(replica=2, fsdp=4), accumulate=2, run=replace(run, optim=OptimConfig()))
    images = np.random.default_rng(0).normal(1.0, 2.0, (ROWS, 8, 8, 1)).astype(np.float32)
    labels = np.arange(ROWS, dtype=np.int32)
    with built.on_mesh:
        arrays = put_like({"images": images, "labels": labels}, built.batch)
        state, _ = built.train_step(built.init(jax.random.key(0)), arrays)
        sums = built.eval_step(state.params, arrays)
        norm, scale = on_host(state.params["module"]["norm"]), np.asarray(state.params["module"]["scale"])
    flat = images.reshape(ROWS, 64)
    mean = np.mean([0.25 * flat[first::2].mean(axis=0) for first in (0, 1)], axis=0)
    variance = np.mean([0.75 + 0.25 * flat[first::2].var(axis=0) for first in (0, 1)], axis=0)
    np.testing.assert_allclose(norm["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm["var"], variance, rtol=1e-5)
    found = (flat - mean) / np.sqrt(variance) * scale
    log_probs = found - np.log(np.exp(found).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(sums["loss"], -log_probs[np.arange(ROWS), labels].sum(), rtol=1e-4)


def test_parameters_are_used_in_the_compute_dtype_and_state_in_its_own() -> None:
    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Looking(Plain):
        def call(self, module: Any, batch: Mapping[str, jax.Array], *, train: bool) -> Any:
            seen.update(kernel=module.head.kernel.dtype, mean=module.batch_norm.mean.dtype, calls=module.calls.dtype)
            return super().call(module, batch, train=train)

    built = declared(Looking(), run=replace(RUN, precision=Precision()))
    with built.on_mesh:
        built.train_step.trace(built.state, built.batch)
    assert seen == {"kernel": jnp.bfloat16, "mean": jnp.float32, "calls": jnp.int32}
    assert built.state.params["module"]["calls"].dtype == jnp.int32


# Declarations


def specs(model: FlaxModel, **sizes: int) -> dict[str, ParamSpec]:
    module = model.build(Partitioner(mesh=MeshConfig(**sizes)))
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): spec for path, spec in leaves}


def test_annotated_parameters_are_sharded_as_they_say_and_others_by_their_largest_dimension() -> None:
    found = {path: spec.axes for path, spec in specs(Plain(), fsdp=4).items()}
    assert found["module.mlp.0.kernel"] == ("embed", "mlp")
    assert found["module.mlp.1.kernel"] == ("tensor", "fsdp")
    assert found["module.embed.embedding"] == (None, "embed")
    assert found["module.conv.kernel"] == (None, "embed", None)
    assert found["module.head.kernel"] == (None, "embed")
    replicated = ("module.mlp.0.bias", "module.norm.scale", "module.batch_norm.mean", "module.calls")
    assert {axis for path in replicated for axis in found[path]} <= {None}
    params = declared(Plain(), CUBE).params["module"]["mlp"]
    assert str(params["0"]["kernel"].sharding.spec) == "P('fsdp', 'tensor')"
    assert str(params["1"]["kernel"].sharding.spec) == "P('tensor', 'fsdp')"


def test_what_no_shards_divide_is_replicated() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(FlaxModel):
        def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
            return nnx.Linear(7, 9, rngs=rngs)

    assert specs(Odd(), fsdp=4)["module.kernel"].axes == (None, None)
    assert specs(Odd(), fsdp=3)["module.kernel"].axes == (None, "embed")


def test_roles_follow_from_names_and_dimensions() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Attending(FlaxModel):
        def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
            return nnx.MultiHeadAttention(2, 16, use_bias=True, rngs=rngs)

    found = specs(Plain()) | {f"attention.{path}": spec for path, spec in specs(Attending()).items()}
    wanted = {
        "module.embed.embedding": ("embedding", (), ()),
        "module.conv.kernel": ("matrix", (0, 1), (2,)),
        "module.head.kernel": ("matrix", (0,), (1,)),
        "module.head.bias": ("bias", (), ()),
        "module.norm.scale": ("norm", (), ()),
        "attention.module.query.kernel": ("matrix", (0,), (1, 2)),
        "attention.module.query.bias": ("bias", (), ()),
        "attention.module.out.kernel": ("matrix", (0, 1), (2,)),
    }
    assert {path: (found[path].role, found[path].in_dims, found[path].out_dims) for path in wanted} == wanted
    states = {path: (spec.state, spec.dtype) for path, spec in found.items() if spec.state != "trained"}
    assert states == {
        "module.batch_norm.mean": ("buffer", "float32"),
        "module.batch_norm.var": ("buffer", "float32"),
        "module.calls": ("buffer", "int32"),
    }


# Runs

CONFIG = """
from dataclasses import dataclass
from tests.models.test_flax_model import Net
from jaxinfra.models.flax_model import FlaxModel
from flax import nnx

@dataclass(frozen=True, kw_only=True)
class Mine(FlaxModel):
    vocab_size: int = 304
    def make_module(self, rngs):
        net = Net(0.2, rngs)
        net.embed, net.head = nnx.Embed(self.vocab_size, 32, rngs=rngs), nnx.Linear(32, self.vocab_size, rngs=rngs)
        return net

def config() -> Run:"""
MODEL = """\
TransformerConfig(
            vocab_size=304, num_layers=2, hidden_size=32, layers=(Layer(mixer=Attention(num_heads=8), mlp=MLP(dim=64)),)
        )"""


@pytest.fixture
def mine(tiny: Tiny) -> Tiny:
    """The tiny run with a model of its config file."""
    path = tiny.edited(MODEL, "Mine()", "mine.py")
    path.write_text(path.read_text().replace("\ndef config() -> Run:", CONFIG))
    return replace(tiny, config=path)


@pytest.mark.slow(12)
def test_a_run_that_goes_on_is_the_one_that_never_stopped(mine: Tiny) -> None:
    """With dropout, running averages, a counter and microbatches."""
    words = ("name=tiny", "mesh.fsdp=4", "mesh.tensor=2", "train.accumulate=2", "optim.ema_decay=0.9")
    assert (ended := mine.launch(*words)).code == 0, ended
    whole, directory = mine.losses(), mine.directory()
    last = directory / "checkpoints" / "12"
    kept = shutil.move(last, directory / "kept")
    assert mine.launch(*words).code == 0
    assert mine.losses() == whole and float.fromhex(whole[12]) < float.fromhex(whole[1])
    built = make_program(mine.loaded(*words))

    def saved() -> Arrays:
        with built.on_mesh, CheckpointManager(directory / "checkpoints", read_only=True) as checkpoints:
            return on_host(checkpoints.restore(12, built.state))

    resumed = saved()
    shutil.rmtree(last)
    shutil.move(kept, last)
    unbroken = saved()
    assert {path for path, one in unbroken.items() if not np.array_equal(one, resumed[path])} == set()
    counter = next(one for path, one in unbroken.items() if path.endswith("params.module.calls"))
    assert counter == 12


def test_a_failing_call_is_one_line_with_the_users_file_and_line(mine: Tiny) -> None:
    call = "    def call(self, module, batch, *, train):\n        return batch['nothing']\n\n"
    text = mine.config.read_text().replace("    def make_module", f"{call}    def make_module")
    mine.config.write_text(text)
    line = text.split("batch['nothing']")[0].count("\n") + 1
    refused(mine.launch(), f"{mine.config}:{line}: KeyError nothing Mine model")


# Refusals


@dataclass(frozen=True, kw_only=True)
class Returns(Plain):
    """Calls with another result."""

    what: str = ""

    def call(self, module: Any, batch: Mapping[str, jax.Array], *, train: bool) -> Any:
        found = module(batch["inputs"])
        if self.what == "state":
            module.calls.set_value(jnp.zeros((2,), jnp.int32))
            return found
        return {"nothing": None, "rows": found[:3], "dimensions": found[..., 0], "sum": found.sum()}[self.what]


@dataclass(frozen=True, kw_only=True)
class Makes(FlaxModel):
    """Makes no module that can be trained."""

    what: str = ""

    def make_module(self, rngs: nnx.Rngs) -> Any:
        if self.what == "unknown axis":
            return nnx.Linear(8, 8, kernel_init=nnx.with_partitioning(nnx.initializers.ones, ("model",)), rngs=rngs)
        return {"linen": Linen(), "uninitialized": nnx.bridge.ToNNX(Linen(), rngs=rngs)}[self.what]


HERE, FAILS = __file__, inspect.getsourcelines(Makes)[1] + 9


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Returns(what="nothing"), "Returns.call nothing [16, ...]"),
        (Returns(what="rows"), "Returns.call (3, 16, 64) 16 [16, ...]"),
        (Returns(what="sum"), "Returns.call () 16 [16, ...]"),
        (Returns(what="dimensions"), "(16, 16) logits [16, 16, N]"),
        (Returns(what="state"), "module.calls () (2,) Returns"),
        (Makes(what="linen"), "Makes.make_module Linen nnx.bridge.ToNNX"),
        (Makes(what="uninitialized"), "Makes.make_module nnx.Param lazy_init"),
        (Makes(what="unknown axis"), "Makes module.kernel 'model' embed tensor"),
        (Makes(what="?"), f"{HERE}:{FAILS}: KeyError Makes model"),
    ],
)
def test_modules_that_cannot_be_trained(model: FlaxModel, named: str) -> None:
    with raises(ConfigError, named):
        declared(model).lower()


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (replace(RUN, mesh=MeshConfig(fsdp=1, stage=2)), "mesh.stage=2 use mesh.stage=1"),
        (replace(RUN, mesh=MeshConfig(fsdp=1, context=2)), "mesh.context=2 use mesh.context=1"),
        (
            replace(RUN, mesh=ONE, precision=Precision(quantize="int8")),
            "precision.quantize=int8 Plain precision.quantize=none",
        ),
        (replace(RUN, model=OfImages(), mesh=MeshConfig(fsdp=1, tensor=2)), "mesh.tensor=2 OfImages use mesh.tensor=1"),
    ],
    ids=["stage", "context", "quantize", "tensor"],
)
def test_what_plain_modules_cannot_have(run: Run, named: str) -> None:
    with raises(ConfigError, named):
        declared(run.model, run.mesh, run)
