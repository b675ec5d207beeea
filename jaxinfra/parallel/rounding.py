"""Rounds every product of an elementwise update, so that its bits do not depend on the shapes of arrays.

A compiler may compute `a * b + c` with one rounding (a fused multiply-add) or with two. XLA leaves the choice to the
code generator of the platform, which may decide differently for small and for large arrays. A device's part of a
parameter has another size on another mesh, so such an update has other bits there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.spec import PyTree

_PRODUCTS = ("mul", "square", "integer_pow")  # an addition may be fused with these
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
"""Primitives that call a function, and the parameter with its closed jaxpr."""


def rounded(x: jax.Array, zero: jax.Array) -> jax.Array:
    """Returns `x`, rounded to its dtype before anything is added to it.

    `zero` is an int32 scalar that is 0 without the compiler knowing it. It is combined with the bits of `x`: product
    and sum stay in one loop over the array, but not in one instruction.
    """
    integers = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integers)
    return jax.lax.bitcast_convert_type(bits | zero.astype(integers), x.dtype)


def unknown_zero(x: jax.Array) -> jax.Array:
    """Returns the 0 that `rounded` needs: whether a scalar is NaN. No compiler can know it; with a NaN all is lost."""
    return (x != x).astype(jnp.int32)


def with_rounded_products(fun: Callable[..., PyTree], zero: jax.Array, name: str) -> Callable[..., PyTree]:
    """Wraps an elementwise function: each of its products is `rounded`.

    The wrapped function raises ConfigError if `fun` has a loop, a branch or a `shard_map`; `name` is the config field
    to blame.
    """

    def call(*args: PyTree) -> PyTree:
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), zero, name)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return call


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], zero: jax.Array, name: str) -> list[Any]:
    """Computes a jaxpr equation by equation, with rounded products; arguments as in `with_rounded_products`."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        primitive, inputs = equation.primitive, [read(atom) for atom in equation.invars]
        if (inner := _CALLS.get(primitive.name)) is not None:
            called = equation.params[inner]
            outputs = _evaluate(called.jaxpr, called.consts, inputs, zero, name)
        elif any(isinstance(x, Jaxpr) or hasattr(x, "jaxpr") for x in jax.tree.leaves(list(equation.params.values()))):
            raise ConfigError(
                f"{name}: has a {primitive.name}, but train.canonical needs updates without loops and branches; use "
                "optim.optimizer=adamw"
            )
        else:
            outputs = primitive.bind(*inputs, **equation.params)
            outputs = outputs if primitive.multiple_results else [outputs]
            if primitive.name in _PRODUCTS:
                outputs = [rounded(x, zero) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
