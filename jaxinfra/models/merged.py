"""Weights of a model alone, in which their adapters are merged."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, auto_axes

from jaxinfra.models.adapt import adapter_path, packed_paths
from jaxinfra.models.adapter import Lora
from jaxinfra.ops.packed import unpack
from jaxinfra.parallel.sharding import SpecEntry
from jaxinfra.parallel.spec import ParamSpec


def merged(
    params: Mapping[str, jax.Array], path: str, spec: ParamSpec, adapter: Lora | None, axes: Sequence[SpecEntry]
) -> jax.Array:
    """Returns a weight without codes and with its adapter, float32 where it has one of them.

    Args:
        params: the parameters of the run, by path.
        path: that of the weight.
        spec: its declaration in the model alone.
        adapter: the config of adapters.
        axes: the mesh axes that shard it then.
    """
    weight, scale = params[path], params.get(packed_paths(path)[1])
    a, b, magnitude = (params.get(f"{adapter_path(path)}.{name}") for name in ("a", "b", "magnitude"))
    if a is None and scale is None:
        return weight

    def merge(
        weight: jax.Array,
        scale: jax.Array | None,
        a: jax.Array | None,
        b: jax.Array | None,
        magnitude: jax.Array | None,
    ) -> jax.Array:
        whole = _whole(weight, scale, spec)
        if a is None or b is None:
            return whole
        assert adapter is not None
        first = spec.in_dims[0]
        batch = tuple(range(first))
        product = jax.lax.dot_general(a, b, (((a.ndim - 1,), (first,)), (batch, batch)), precision="highest")
        changed = whole + adapter.alpha / adapter.rank * product
        if magnitude is None:
            return changed
        before, after = (jnp.sum(jnp.square(each), spec.in_dims, keepdims=True) for each in (whole, changed))
        return changed * jnp.expand_dims(magnitude, spec.in_dims) * jnp.sqrt(before / after)

    return _auto(merge, axes)(weight, scale, a, b, magnitude)


def feature_norms(params: Mapping[str, jax.Array], path: str, spec: ParamSpec) -> jax.Array:
    """Returns the norm of each output feature of a frozen weight, float32 `[layers, *N]`; `params` are by path."""

    def norms(weight: jax.Array, scale: jax.Array | None) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(_whole(weight, scale, spec)), axis=spec.in_dims))

    arrays = params[path], params.get(packed_paths(path)[1])
    axes = jax.typeof(arrays[0]).sharding.spec.partitions
    kept = [axes[dim] for dim in range(len(spec.shape)) if dim not in spec.in_dims]
    return _auto(norms, kept)(*arrays)


def _whole(weight: jax.Array, scale: jax.Array | None, spec: ParamSpec) -> jax.Array:
    if scale is None:
        return weight.astype(jnp.float32)
    return unpack(weight, scale, spec.in_dims[-1], jnp.dtype("float32"))


def _auto(fun: Callable[..., jax.Array], axes: Sequence[SpecEntry]) -> Callable[..., jax.Array]:
    """Compiles a function whose arrays XLA shards by itself, but for the result."""
    return jax.jit(auto_axes(fun, out_sharding=PartitionSpec(*axes)))
