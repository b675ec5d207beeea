"""Any plain Flax module as the model of a run.

The module needs no code for sharding: it runs in a region of automatic sharding (`auto_axes`) inside the explicitly
sharded step. There JAX's partitioner chooses the collectives from the shardings of parameters and batches.

Variables are named by their path in the module, such as `("mlp", 0, "kernel")`; as parameters of the run they are
`module.mlp.0.kernel`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PathParts
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec, auto_axes

from jaxinfra.errors import ConfigError
from jaxinfra.models.model import ModelConfig
from jaxinfra.models.module import Inputs, LayerStats, Module
from jaxinfra.models.remat import remat
from jaxinfra.ops.dropout import DROPOUT_FIELD
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import LogicalAxes, ShardingRules
from jaxinfra.parallel.sharding import GATHERED_WEIGHT, Partitioner, axis_names
from jaxinfra.parallel.spec import Params, ParamSpec, Role, constant, param_key

CALLS = "calls"
"""The statistic that counts how often the module was called in a step."""

SHARDING_METADATA = ("out_sharding", "sharding_rules", "mesh", "linen_meta_type")
"""Metadata of Flax variables about sharding."""


class FlaxModel(ModelConfig, ABC):
    """A model that is a plain Flax module: a frozen dataclass that inherits from this class and defines `make_module`.

    Every floating-point `nnx.Param` is trained. All other variables, such as the running averages of `nnx.BatchNorm`,
    are buffers that the module updates in training; with gradient accumulation the new value is the mean over
    microbatches. Random number streams are not kept: each step starts new ones.
    """

    @abstractmethod
    def make_module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns a new module; for a Linen module, `nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(sample)`."""

    def call(self, module: Any, batch: Inputs, *, train: bool) -> Any:
        """Returns the logits of a batch, `[B, ...]`.

        The module is already in training or evaluation mode. Its parameters, and floating-point arrays of the batch,
        have the dtype `precision.compute`.
        """
        return module(batch["inputs"] if "inputs" in batch else batch["images"])

    @property
    @override
    def uses_dropout(self) -> bool:
        return True  # any module may; and `FlaxModule._run` knows by the random bits in the batch that it trains

    @override
    def build(self, partitioner: Partitioner) -> "FlaxModule":
        return FlaxModule(self, partitioner)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleStructure:
    """The structure of a module, without arrays.

    Attributes:
        graphdef: its graph definition.
        specs: the `ParamSpec` of each variable, by path.
        rngs: shapes of the keys and counters of its random number streams, by path.
    """

    graphdef: nnx.GraphDef
    specs: Mapping[PathParts, ParamSpec]
    rngs: Mapping[PathParts, jax.ShapeDtypeStruct]


class FlaxModule(Module):
    """Runs the module of a `FlaxModel` on a mesh."""

    partial_gradients: ClassVar[bool] = False  # they come out summed over the mesh, by JAX's partitioner

    def __init__(self, config: FlaxModel, partitioner: Partitioner):
        self.config, self.partitioner = config, partitioner
        name = type(config).__qualname__
        if partitioner.quantize != "none":
            raise ConfigError(
                f"precision.quantize={partitioner.quantize}: {name} makes a plain Flax module, whose products are not "
                "quantized; use precision.quantize=none"
            )
        self.structure = _structure(config, partitioner)
        shardings = [partitioner.stored_spec(_param_name(path), spec) for path, spec in self.structure.specs.items()]
        uses_tensor = any("tensor" in str(sharding) for sharding in shardings)
        # In canonical mode (`alone`) each device computes rows of its own, and the mesh shards only what is stored.
        if partitioner.mesh.tensor > 1 and not uses_tensor and not partitioner.alone:
            raise ConfigError(
                f"mesh.tensor={partitioner.mesh.tensor}: no parameter of {name} is sharded over it, so its devices "
                'would repeat work; use mesh.tensor=1, or nnx.with_partitioning(init, ("embed", "mlp")) in the module'
            )
        self.module = nnx.data(_unflatten({path: nnx.Param(spec) for path, spec in self.structure.specs.items()}))

    @override
    def init_params(self, key: jax.Array, shardings: Any) -> Params:
        def init(key: jax.Array) -> Params:
            values = _flatten(nnx.state(_make_module(self.config, nnx.Rngs(key)), nnx.Not(nnx.RngState)))
            return {"module": _unflatten(values)}

        return self._auto_sharded(init, shardings)(key)

    @override
    def __call__(self, batch: Inputs, /) -> Any:
        return self.forward(batch)[0]

    @override
    def forward(self, batch: Inputs, /) -> tuple[Any, LayerStats]:
        inputs = {name: array for name, array in batch.items() if name != DROPOUT_FIELD}
        bits = batch.get(DROPOUT_FIELD)
        values = {path: _at(self.module, path)[...] for path in self.structure.specs}
        # Checked first: another output could not have the sharding below, and the error would not say why.
        shapes, _ = jax.eval_shape(self._auto_sharded(self._run, PartitionSpec()), values, inputs, bits)
        self._check_output(shapes, rows=next(iter(inputs.values())).shape[0])
        run = self._auto_sharded(self._run, (self.partitioner.spec("batch"), PartitionSpec()))
        # The backward pass gathers the weights again.
        return remat(lambda values: run(self._gather(values), inputs, bits), "weights", alone=False)(values)

    def _check_output(self, output: Any, rows: int) -> None:
        arrays = jax.tree.leaves(output)
        wrong = [f"an array of shape {a.shape}" for a in arrays if a.shape[:1] != (rows,)] if arrays else ["nothing"]
        if wrong:
            raise ConfigError(
                f"{type(self.config).__qualname__}.call: returned {wrong[0]} for a batch of {rows}; return logits "
                f"[{rows}, ...]"
            )

    def _gather(self, values: Mapping[PathParts, jax.Array]) -> dict[PathParts, jax.Array]:
        """Casts parameters to the compute dtype and all-gathers them over the axes that shard the batch.

        Otherwise JAX's partitioner moves activations to the shards of the parameters: several times the bytes.
        """
        gathered, batch_axes = {}, self.partitioner.mesh_axes("batch")
        for path, spec in self.structure.specs.items():
            dtype = jnp.dtype(spec.dtype) if spec.state == "buffer" else self.partitioner.compute_dtype
            stored = PartitionSpec()
            if not self.partitioner.alone:
                stored = self.partitioner.stored_spec(_param_name(path), spec)
            # P("fsdp", "tensor") becomes P(None, "tensor").
            kept = [tuple(axis for axis in axis_names(entry) if axis not in batch_axes) for entry in stored.partitions]
            value = jax.reshard(values[path].astype(dtype), PartitionSpec(*(axes or None for axes in kept)))
            gathered[path] = checkpoint_name(value, GATHERED_WEIGHT)
        return gathered

    def _auto_sharded[R](self, fun: Callable[..., R], out: Any) -> Callable[..., R]:
        """Wraps `fun`: JAX's partitioner shards it inside, and its results have the shardings `out`."""
        if self.partitioner.alone:
            return fun
        wrapped: Any = auto_axes(fun, out_sharding=out)
        return wrapped

    def _run(
        self, values: Mapping[PathParts, jax.Array], inputs: Inputs, bits: jax.Array | None
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Returns the result of the call and, in training (with `bits`), the statistics of the buffers."""
        structure, train, compute = self.structure, bits is not None, self.partitioner.compute_dtype
        key = jax.random.key(0 if bits is None else bits[0, 0])  # those of a token, from seed and step
        rngs = {path: _restart_rng(key, path, shape) for path, shape in structure.rngs.items()}
        module = nnx.merge(structure.graphdef, nnx.State(nnx.traversals.unflatten_mapping({**values, **rngs})))
        if train:
            module.train()
        else:
            module.eval()
        inputs = {name: a.astype(compute) if _is_floating(a) else a for name, a in inputs.items()}
        output = self.config.call(module, inputs, train=train)
        return output, self._buffer_stats(values, _flatten(nnx.state(module))) if train else {}

    @property
    def _buffers(self) -> dict[PathParts, ParamSpec]:
        """The variables that the module updates itself."""
        return {path: spec for path, spec in self.structure.specs.items() if spec.state == "buffer"}

    def _buffer_stats(
        self, before: Mapping[PathParts, jax.Array], after: Mapping[PathParts, jax.Array]
    ) -> dict[str, jax.Array]:
        """Returns what `update_buffers` needs; the train step sums it over microbatches."""
        stats = {}
        for path, spec in self._buffers.items():
            name, value = _param_name(path), after[path]
            if value.shape != spec.shape:
                raise ConfigError(
                    f"{name}: a call changes its shape from {spec.shape} to {value.shape}; keep to one shape in "
                    f"{type(self.config).__qualname__}"
                )
            if _is_floating(value):
                stats[name] = value.astype(jnp.float32)
            else:  # the change, because the sum of large integers over microbatches would overflow
                stats[name] = value.astype(jnp.int32) - before[path].astype(jnp.int32)
        return {**stats, CALLS: jnp.ones((), jnp.int32)} if stats else {}

    @override
    def update_buffers(self, stats: LayerStats) -> dict[str, Any]:
        if not stats:
            return {}
        changed = {}
        for path, spec in self._buffers.items():
            name = _param_name(path)
            if _is_floating(stats[name]):
                value = stats[name] / stats[CALLS]
            else:
                value = _at(self.module, path)[...].astype(jnp.int32) + stats[name] // stats[CALLS]
            changed[path] = jax.reshard(value.astype(spec.dtype), self.partitioner.stored_spec(name, spec))
        return {"module": _unflatten(changed)}


def _make_module(config: FlaxModel, rngs: nnx.Rngs) -> nnx.Module:
    """Makes the module of the user; ConfigError if it is none."""
    with nnx.use_eager_sharding(False):  # annotations may name logical axes that are not in the mesh
        module = config.make_module(rngs)
    if not isinstance(module, nnx.Module):
        raise ConfigError(
            f"{type(config).__qualname__}.make_module: returned {type(module).__qualname__}; return a flax.nnx.Module, "
            "for a Linen module nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(sample)"
        )
    return module


def _structure(config: FlaxModel, partitioner: Partitioner) -> ModuleStructure:
    """Traces the creation of the module, without arrays; ConfigError if it has nothing to train."""
    abstract = nnx.eval_shape(lambda: _make_module(config, nnx.Rngs(0)))
    nodes, name = dict(nnx.iter_graph(abstract)), type(config).__qualname__
    specs = {
        path: _param_spec(f"{name}: {_param_name(path)}", str(path[-1]), variable, nodes.get(path[:-1]), partitioner)
        for path, variable in nnx.to_flat_state(nnx.state(abstract, nnx.Not(nnx.RngState)))
    }
    if not any(spec.state == "trained" for spec in specs.values()):
        raise ConfigError(
            f"{name}.make_module: the module has no nnx.Param to train; a Linen module gets its parameters by "
            "nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(sample)"
        )
    for variable in nodes.values():
        if isinstance(variable, nnx.Variable):
            # Linen would apply these annotations in the call, where logical axes are unknown.
            for key in SHARDING_METADATA:
                if variable.has_metadata(key):
                    variable.del_metadata(key)
    graphdef, rngs, _ = nnx.split(abstract, nnx.RngState, ...)
    return ModuleStructure(graphdef=graphdef, specs=specs, rngs=_flatten(rngs))


def _param_spec(where: str, name: str, variable: nnx.Variable, owner: Any, partitioner: Partitioner) -> ParamSpec:
    """Declares a variable; its name, its dimensions and the module that owns it tell how it is used.

    `where` begins error messages. The module draws its own initial values (`FlaxModule.init_params`).
    """
    shape, dtype, init = variable.shape, str(variable.dtype), constant(0)
    if not any(jnp.issubdtype(variable.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise ConfigError(f"{where}: is {dtype}; a variable may be floating point, integer or bool")
    axes = _annotated_axes(where, variable)
    if not (isinstance(variable, nnx.Param) and _is_floating(variable)):
        axes = axes or (None,) * len(shape)  # a buffer is not trained, so its role does not matter
        return ParamSpec(shape=shape, axes=axes, init=init, role="bias", state="buffer", dtype=dtype)
    role: Role = "matrix"
    if "bias" in name or len(shape) < 2:
        role = "bias" if "bias" in name else "norm"
    elif name == "embedding":
        role = "embedding"
    axes = axes or _default_axes(shape, role, partitioner.stored.num_shards("embed"))
    if role != "matrix":
        return ParamSpec(shape=shape, axes=axes, init=init, role=role)
    # A kernel is `[*in_features, *out_features]`; nnx.LinearGeneral may have several of both.
    features = getattr(owner, "out_features", None)
    first_out = len(shape) - (len(features) if isinstance(features, tuple) else 1)
    # Stacked layers, which a module may have, are no input.
    in_dims = tuple(dim for dim in range(first_out) if axes[dim] != "layers")
    out_dims = tuple(range(first_out, len(shape)))
    return ParamSpec(shape=shape, axes=axes, init=init, role=role, in_dims=in_dims, out_dims=out_dims)


def _annotated_axes(where: str, variable: nnx.Variable) -> LogicalAxes | None:
    """Returns the axes that the module names for each dimension; None if it names none."""
    annotation = variable.get_metadata("out_sharding", None)
    if annotation is None:
        return None
    names = tuple(annotation.spec if isinstance(annotation, NamedSharding) else annotation)
    known = [field.name for cls in (ShardingRules, MeshConfig) for field in fields(cls)]
    for axis in names:
        if axis is not None and axis not in known:
            raise ConfigError(
                f"{where}: is annotated with the axis {axis!r}; use one of {', '.join(known)}, or None for a dimension "
                "that is not sharded"
            )
    return (*names, *(None,) * (len(variable.shape) - len(names)))


def _default_axes(shape: tuple[int, ...], role: Role, shards: int) -> LogicalAxes:
    """Shards the largest divisible dimension of a matrix, and the columns of an embedding."""
    candidates = list(range(len(shape))) if role == "matrix" else []
    if role == "embedding":
        candidates = [len(shape) - 1]  # a lookup in an embedding with sharded rows would gather them
    divisible = [dim for dim in candidates if shape[dim] % shards == 0]
    largest = max(divisible, key=lambda dim: shape[dim], default=None)
    return tuple("embed" if dim == largest else None for dim in range(len(shape)))


def _restart_rng(key: jax.Array, path: PathParts, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the key or the counter of a random number stream at the start of a step."""
    if not jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jnp.zeros(shape.shape, shape.dtype)
    own = param_key(key, _param_name(path))
    return jax.random.split(own, shape.shape) if shape.shape else own


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _flatten(state: nnx.State) -> dict[PathParts, Any]:
    return nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))


def _unflatten(values: Mapping[PathParts, Any]) -> dict[str, Any]:
    """Builds a nested dict; indices of lists become strings."""
    return nnx.traversals.unflatten_mapping({tuple(map(str, path)): value for path, value in values.items()})


def _at(tree: Any, path: PathParts) -> Any:
    """Returns what is at a path of a nested dict that `_unflatten` has built."""
    for key in path:
        tree = tree[str(key)]
    return tree


def _param_name(path: PathParts) -> str:
    """Returns the name of a variable among the parameters of the run."""
    return ".".join(map(str, ("module", *path)))
