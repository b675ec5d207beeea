"""Computes numbers that follow from a config, such as FLOPs and bytes; `show` and the start of a run print them.

Uses no device: the program may be on an abstract mesh.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.parallel.canonical import VirtualShards
from jaxinfra.parallel.schedules import schedule_summary
from jaxinfra.program import Program
from jaxinfra.program.canonical_engine import CanonicalEngine
from jaxinfra.program.pipeline_engine import PipelineEngine
from jaxinfra.track.base import RunStatistics


def per_device_bytes(tree: Any) -> int:
    """Returns the bytes of one device's shards of a tree of `ShapeDtypeStruct`s."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def gib(n_bytes: float) -> str:
    """Formats a number of bytes in GiB."""
    return f"{n_bytes / 2**30:.3f} GiB"


def units_per_step(program: Program) -> int:
    """Returns the number of tokens or images in one global batch."""
    return program.run.train.global_batch * program.run.data.units_per_sample


def step_flops(program: Program) -> float:
    """Returns the FLOPs of one step over all devices; 6 per parameter and token if the model defines no `flops`."""
    data, flops = program.run.data, program.flops_per_sample
    if flops is None:
        return 6.0 * program.num_params * data.units_per_sample * program.run.train.global_batch
    # Training on a sequence costs three forward passes, the reference another one.
    of_reference = len(program.objective.reference_fields) * flops / 3 if program.keeps_reference else 0.0
    return (program.objective.flops(flops) + of_reference) * program.run.train.global_batch


def _canonical_costs(shards: VirtualShards, params: Any, gradients: Any) -> RunStatistics:
    """Returns what a device holds and receives in canonical mode, in which it has whole gradients."""
    weights, grads = (sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) for tree in (params, gradients))
    held = shards.per_device.bit_length()  # a gradient, and a sum for each halving of the virtual shards of a device
    # Of each gradient a device adds one part of as many as there are devices; replicas then exchange their parts.
    gathered = weights - per_device_bytes(params)
    reduced = grads + per_device_bytes(gradients) - 2 * grads / shards.devices
    return {
        "virtual shards": (shards.count, f"train.canonical: {shards.per_device} a device, one after another"),
        "canonical, held a device": (
            gib(weights + held * grads),
            f"during a step: all parameters, and {held} times all gradients",
        ),
        "canonical, received a device": (
            gib(gathered + reduced),
            f"a step: up to {gib(gathered)} of parameters, and {gib(reduced)} of gradients, as by a reduce-scatter",
        ),
    }


def run_statistics(program: Program, train_units: int | None = None, train_rows: int | None = None) -> RunStatistics:
    """Computes the statistics.

    `train_units` is the number of tokens or images in the training data, `train_rows` that of its rows, if known.
    """
    run, state, batch = program.run, program.state, program.run.train.global_batch
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    modality, units = run.data.modality, units_per_step(program) * run.train.steps
    a_modality = f"{'an' if modality[0] in 'aeiou' else 'a'} {modality}"
    embedded = sum(s.size for s in jax.tree.leaves(program.specs) if s.role in ("embedding", "head"))
    flops = step_flops(program) * run.train.steps
    gradients = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params)
    tokens_per_parameter: RunStatistics = {}
    if modality == "token":
        note = "20 is compute-optimal (Hoffmann et al. 2022)"
        tokens_per_parameter = {"tokens a parameter": (units / program.num_params, note)}
    numbers: dict[str, tuple[int | float | str, str]] = {
        "devices": (program.mesh.size, mesh),
        "parameters": (program.num_params, ""),
        "parameters of blocks": (program.num_params - embedded, "without embeddings and head"),
        "samples a device": (program.rows_per_device, f"global batch {batch}"),
        "microbatches": (run.train.accumulate, "a step"),
        f"{modality}s a step": (units_per_step(program), ""),
        "steps": (run.train.steps, ""),
        f"{modality}s": (units, f"steps x {modality}s a step"),
        **tokens_per_parameter,
        f"FLOPs {a_modality}": (flops / units, "6 x matmul parameters + attention"),
        "FLOPs": (flops, "of the whole run"),
        "state a device": (
            gib(sum(per_device_bytes(tree) for tree in (state.params, gradients, state.opt_state))),
            "parameters, gradients and optimizer state; activations come on top",
        ),
        "parameters a device": (gib(per_device_bytes(state.params)), run.precision.params),
        "gradients a device": (gib(per_device_bytes(gradients)), "float32"),
        "optimizer state a device": (gib(per_device_bytes(state.opt_state)), run.optim.state_dtype),
    }
    if isinstance(program.engine, CanonicalEngine):
        numbers |= _canonical_costs(program.engine.virtual_shards, state.params, gradients)
    for kind, choice in program.module.context_costs(run.data).items():
        numbers[f"{kind} attention over shards"] = (choice.method, "compare the bytes waited for (ops/context_cost.py)")
        for method, cost in choice.costs.items():
            note = f"waited for, of {gib(cost.received_bytes)} a sequence and layer; holds {gib(cost.held_bytes)}"
            numbers[f"{kind} attention, {method}"] = (gib(cost.exposed_bytes), note)
    if isinstance(program.engine, PipelineEngine):
        numbers |= schedule_summary(run.pipeline.make_schedule(program.partitioner.mesh.stage, run.train.accumulate))
    if train_rows is not None and getattr(run.data, "packing", "concat") != "concat":  # rows have padding
        note = f"of {train_rows:,} rows with {train_units:,} {modality}s"
        numbers["epochs"] = (run.train.steps * batch / train_rows, note)
    elif train_units is not None:
        numbers["epochs"] = (units / train_units, f"of {train_units:,} {modality}s")
    return numbers
