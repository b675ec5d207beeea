"""The program that decodes on CPUs: the same model with parameters and a cache for each layer.

A scan over stacked layers copies the weights of each layer out of the stack, and the cache of each layer out of a stack
and into another one. On a CPU this takes longer than a token. The head is stored apart from a tied embedding, in the
order in which a matmul reads it. TPUs and GPUs decode with the stacked layers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxinfra.inference.language_model import require_text
from jaxinfra.models.adapt import adapted_path
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.spec import Params, PyTree, leaves_by_name
from jaxinfra.program import Program

_STACKS = ("prefix", "blocks", "tail")


def unrolled(program: Program) -> tuple[Program, Callable[[Params], Params]]:
    """Returns the program that decodes, and what turns parameters into its own: copies of them on CPUs."""
    model = require_text(program.run)[0]
    adapter, is_packed = program.run.adapter, program.run.precision.packed is not None
    if program.partitioner.platform != "cpu" or model.num_layers == 1 or is_packed:
        return program, lambda params: params
    scaled = model.in_mup(program.run.width_ratio)
    changed = replace(scaled, layers=scaled.all_layers, first_layers=(), tie_embeddings=False)
    split = partial(_split, model=model)
    if adapter is not None:  # named by their paths, which are others now
        with program.on_mesh:
            names = leaves_by_name(jax.eval_shape(split, program.params))
        adapter = replace(
            adapter, targets=tuple({adapted_path(name) for name in names if name.endswith(".a")}), trained=()
        )
    optim = replace(program.run.optim, frozen=(), parametrization="standard", base_width=None)
    run = replace(program.run, model=changed, adapter=adapter, optim=optim)
    return Program(run, program.mesh), jax.jit(split)


def _split(params: PyTree, model: TransformerConfig) -> Params:
    """Splits the stacked layers, and adds the head that a tied embedding is."""
    layers: Params = {}
    for name in _STACKS:
        stack = getattr(model, name)
        for index in range(len(stack.layers) * stack.times if stack else 0):
            time, position = divmod(index, len(stack.layers))
            period = params[name] if len(stack.layers) == 1 else params[name][f"layer_{position}"]
            layers[f"layer_{stack.first + index}"] = jax.tree.map(lambda a, at=time: a[at : at + 1], period)
    rest: Params = {name: value for name, value in params.items() if name not in _STACKS}
    tied = {"unembedding": jnp.copy(params["embedding"].T)} if model.tie_embeddings else {}
    return rest | tied | {"blocks": layers}
