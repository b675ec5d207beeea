"""The adapter of one weight: low-rank matrices, and with DoRA the magnitudes of output features.

Shape suffixes: R rank; K inputs and N outputs of a weight, each one or more dimensions; E experts, M rows.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import ConfigError
from jaxinfra.models.adapter import Lora
from jaxinfra.models.layers import ParamFactory
from jaxinfra.ops.grouped import grouped_dot
from jaxinfra.parallel.rules import LogicalAxes
from jaxinfra.parallel.sharding import axes_by_dim, has_stage_dim, local_weight
from jaxinfra.parallel.spec import ParamSpec, constant, uniform

_used_BR: ContextVar[jax.Array | None] = ContextVar("used_BR", default=None)


@contextmanager
def using_columns(used_BR: jax.Array | None) -> Iterator[None]:
    """Lets each row of a batch, while a model is traced, use some columns of `a` and rows of `b` alone; None is all.

    So adapters of one base that stand side by side, R their ranks together, serve a row each (as in Chen et al. 2023,
    "Punica"). `used_BR` is bool. Raises ConfigError within if an adapter changes more than sums of products.
    """
    token = _used_BR.set(used_BR)
    try:
        yield
    finally:
        _used_BR.reset(token)


def _require_all_columns(what: str) -> None:
    if _used_BR.get() is not None:
        raise ConfigError(f"--adapter: {what} cannot differ within a batch; sample with one adapter at a time")


class LowRank(nnx.Module):
    """Adds `alpha / rank * a @ b` to a frozen weight `[K, N]` or `[E, K, N]`, and rescales its output features.

    The magnitude of a feature is stored as a multiple of that of the frozen weight, so it begins as one.

    Args:
        weight: the declaration of the weight, which may be of stacked layers.
        config: the config of the adapter.
        params: declares the parameters.
    """

    def __init__(self, weight: ParamSpec, config: Lora, params: ParamFactory):
        self.partitioner, self.factor = params.partitioner, config.alpha / config.rank
        layers, first, last = min(params.num_layers, 1), weight.in_dims[0], weight.out_dims[0]
        self.in_dims, batch_dims = len(weight.in_dims), first - layers
        self.batch_axes, self.in_axes, self.out_axes = (
            weight.axes[layers:first],
            weight.axes[first:last],
            weight.axes[last:],
        )
        experts, inputs, outputs = weight.shape[layers:first], weight.shape[first:last], weight.shape[last:]
        a_shape, b_shape = (*experts, *inputs, config.rank), (*experts, config.rank, *outputs)
        bound = math.prod(inputs) ** -0.5  # as in PEFT
        self.a = params.param(
            a_shape, self._a_axes, uniform(bound), "matrix", batch_dims=batch_dims, in_dims=self.in_dims
        )
        self.b = params.param(b_shape, self._b_axes, constant(0.0), "matrix", batch_dims=batch_dims, in_dims=1)
        self.magnitude = params.param(outputs, self.out_axes, constant(1.0), "norm") if config.dora else None

    @property
    def _a_axes(self) -> LogicalAxes:
        return (*self.batch_axes, *self.in_axes, None)

    @property
    def _b_axes(self) -> LogicalAxes:
        return (*self.batch_axes, None, *self.out_axes)

    def gather(self, x_axes: LogicalAxes) -> tuple[jax.Array, jax.Array]:
        """Returns `a` and `b` for use with activations that are sharded over `x_axes`.

        The gradient of `a` is a partial sum over the axes that shard the outputs, too, and that of `b` over those that
        shard the inputs.
        """
        inputs, outputs = (tuple(name for name in axes if name != "embed") for axes in (self.in_axes, self.out_axes))
        gather = self.partitioner.gather_weight
        a = gather(self.a[...], self._a_axes, (*x_axes, *outputs))
        return a, gather(self.b[...], self._b_axes, (*x_axes, *inputs))

    def add(self, y: jax.Array, x: jax.Array, x_axes: LogicalAxes) -> jax.Array:
        """Adds the product of `x` `[..., *K]` with `factor * a @ b` to `y` `[..., *N]`, which may be a partial sum."""
        arrays = [x, *self.gather(x_axes)]
        specs = [jax.typeof(each).sharding.spec for each in arrays]
        x_spec, a_spec, b_spec = specs
        out = jax.typeof(y).sharding.spec
        if (used_BR := _used_BR.get()) is not None:
            specs.append(P(x_spec.partitions[0], None))
            arrays.append(jax.reshard(used_BR, specs[-1]))

        def on_device(x: jax.Array, a: jax.Array, b: jax.Array, *used: jax.Array) -> jax.Array:
            x = jax.lax.pcast(x, tuple(x_spec.reduced), to="varying") if x_spec.reduced else x
            a, b = local_weight(a, a_spec), local_weight(b, b_spec)
            lead, (rank, *outputs) = x.shape[: x.ndim - self.in_dims], b.shape
            z = x.reshape(math.prod(lead), -1) @ a.reshape(-1, rank)
            for used_BR in used:
                z = jnp.where(used_BR[:, None], z.reshape(len(used_BR), -1, rank), 0).reshape(z.shape)
            product = self.factor * (z @ b.reshape(rank, -1)).reshape(*lead, *outputs)
            return jax.lax.pcast(product, tuple(out.unreduced), to="unreduced") if out.unreduced else product

        return y + jax.shard_map(on_device, in_specs=tuple(specs), out_specs=out)(*arrays)

    def grouped(self, x_MK: jax.Array, a_EKR: jax.Array, b_ERN: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Multiplies rows with the matrices of their experts, in a `shard_map`: what to add, `[M, N]`."""
        _require_all_columns("adapters of experts")
        platform = self.partitioner.platform
        z_MR = grouped_dot(x_MK, a_EKR, sizes_E, platform=platform)
        return self.factor * grouped_dot(z_MR, b_ERN, sizes_E, platform=platform)

    def rescale(self, y: jax.Array, weight: jax.Array, x_axes: LogicalAxes, y_axes: LogicalAxes) -> jax.Array:
        """Gives each output feature of `y` `[..., *N]` its magnitude; returns `y` itself without magnitudes.

        As in PEFT, directions are not differentiated. `weight` is the frozen one, gathered for `x_axes`; `y_axes` are
        the leading logical axes of `y`.
        """
        if self.magnitude is None:
            return y
        _require_all_columns("magnitudes")
        out = axes_by_dim(jax.typeof(y).sharding.spec, y.ndim)[-len(self.out_axes) :]
        names = self.out_axes if any(out) else (None,) * len(self.out_axes)
        magnitude = self.partitioner.gather_weight(self.magnitude[...], names, y_axes)
        ratio = self._on_parts(self._ratio, x_axes, weight, of_features=True)
        return self.partitioner.map_local(
            lambda y, magnitude, ratio: (y * (magnitude * ratio)).astype(y.dtype), y, magnitude, ratio
        )

    def merge(self, weight: jax.Array, x_axes: LogicalAxes) -> jax.Array:
        """Returns a weight `[*K, *N]` with its adapter, without gradient; it is gathered for `x_axes`."""
        _require_all_columns("adapters of latent attention's keys and values")

        def merged(
            summed: tuple[str, ...], weight: jax.Array, a: jax.Array, b: jax.Array, *rest: jax.Array
        ) -> jax.Array:
            changed = weight + self._product(a, b)
            return changed * rest[0] * self._ratio(summed, weight, a, b) if rest else changed

        more = (
            []
            if self.magnitude is None
            else [self.partitioner.gather_weight(self.magnitude[...], self.out_axes, x_axes)]
        )
        return self._on_parts(merged, x_axes, weight, *more).astype(weight.dtype)

    def _product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self.factor * jnp.tensordot(a, b, 1)

    def _ratio(self, summed: tuple[str, ...], weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """Returns the magnitudes of the frozen weight over those of the sum, `[*N]`."""
        whole = jnp.stack([weight, weight + self._product(a, b)])
        squares = jnp.sum(jnp.square(whole), axis=tuple(range(1, 1 + self.in_dims)))
        squares = jax.lax.psum(squares, summed) if summed else squares
        return jnp.sqrt(squares[0] / squares[1])

    def _on_parts(
        self,
        fun: Callable[..., jax.Array],
        x_axes: LogicalAxes,
        weight: jax.Array,
        *more: jax.Array,
        of_features: bool = False,
    ) -> jax.Array:
        """Returns `fun(axes of inputs, weight, a, b, *more)` of each device's parts in float32, without gradient."""
        arrays = tuple(map(jax.lax.stop_gradient, (weight, *self.gather(x_axes), *more)))
        arrays = [jax.reshard(each, jax.typeof(each).sharding.spec.update(reduced=frozenset())) for each in arrays]
        specs = tuple(jax.typeof(each).sharding.spec for each in arrays)
        stage = specs[0].partitions[:1] if has_stage_dim(specs[0]) else ()
        last = len(stage) + self.in_dims
        summed = {name for names in axes_by_dim(specs[0], weight.ndim)[len(stage) : last] for name in names}

        def on_device(*arrays: jax.Array) -> jax.Array:
            found = fun(
                tuple(summed), *(local_weight(*each).astype(jnp.float32) for each in zip(arrays, specs, strict=True))
            )
            return found[None] if stage else found

        out = P(*stage, *specs[0].partitions[last:]) if of_features else specs[0]
        return jax.shard_map(on_device, in_specs=specs, out_specs=out)(*arrays)
