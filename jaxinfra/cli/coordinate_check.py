"""`python -m launch coordinate-check CONFIG`: says whether activations keep their size when the model becomes wider.

Trains the model of a run for a few steps at several widths, on one device (Yang et al. 2022, appendix D.1).
"""

import argparse
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.cli import config_argument
from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.models.module import Inputs, LayeredModule
from jaxinfra.models.remat import WATCH
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.optim.schedules import Constant
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.spec import Params
from jaxinfra.parity.meshes import make_program, put_like, random_batch
from jaxinfra.processes.peers import current_peers
from jaxinfra.run import Run
from jaxinfra.run_dir import RunDirectory
from jaxinfra.track.console import fitted_table, print_table, stdout_console
from jaxinfra.train.run_data import RunData

MAX_SLOPE = 0.25
"""The largest exponent of the width by which an activation may grow."""

_LAYER_TENSORS = {"out_proj": "attention output", "mlp_down": "MLP output"}
_log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> None:
    """Prints the sizes and their slopes; raises ConfigError if an activation grows with the width."""
    run, steps = config_argument.load_config(options).run, options.steps
    if not hasattr(run.model, "hidden_size"):
        raise ConfigError(f"model={type(run.model).__name__}: has no field hidden_size, its width; name another model")
    if run.adapter is not None or (run.init or "").startswith("hf:"):
        raise ConfigError(f"{run.name}: has published weights, of one width; check a config that trains from the start")
    optim = replace(run.optim, schedule=Constant())  # others may begin with small steps
    train = replace(run.train, steps=steps, accumulate=1, canonical=None)
    run = replace(run, mesh=MeshConfig(fsdp=1), optim=optim, train=train)
    runs = {width: replace(run, model=run.model.with_width(width)) for width in options.widths}
    for each in runs.values():
        validate(each)  # all of them before the first is trained
    batches = _batches(run, config_argument.prepare_command(options, run))
    sizes = {width: [*_train(each, batches)] for width, each in runs.items()}
    rows, slopes = [], dict[str, float]()
    for name in sizes[options.widths[0]][0]:
        for step in sorted({0, 1, steps}):
            found = [each[step][name] for each in sizes.values()]
            slopes[name] = float(np.polyfit(np.log(options.widths), np.log(found), 1)[0]) if all(found) else math.nan
            rows.append([name, str(step), *(f"{size:.4g}" for size in found), f"{slopes[name]:+.2f}"])
    console, head = stdout_console(), ("mean |x|", "step", *(f"width {width}" for width in sizes), "slope")
    print_table(console, fitted_table(console, head, rows, texts=("mean |x|",)))
    name, slope = max(slopes.items(), key=lambda each: math.inf if math.isnan(each[1]) else each[1])
    line = f"after {steps} steps the {name} grows most with the width, by a slope of {slope:+.2f} (at most {MAX_SLOPE})"
    if not slope <= MAX_SLOPE:
        raise ConfigError(f"{run.name}: {line}; use optim.parametrization=mup, or see docs/transfer.md")
    print(f"no activation grows: {line}")


def _train(run: Run, batches: Sequence[Mapping[str, np.ndarray]]) -> Iterator[Mapping[str, float]]:
    """Yields the mean absolute values before each step and after the last one."""
    program, layers = make_program(run), defaultdict[str, list[float]](list)

    def watch(tensor: str, x: jax.Array) -> None:
        if (name := _LAYER_TENSORS.get(tensor)) is not None:
            jax.debug.callback(lambda size: layers[name].append(float(size)), _size(x))

    @jax.jit
    def sizes(params: Params, batch: Inputs) -> dict[str, jax.Array]:
        model, unset = program.model(params), WATCH.set(watch)
        try:
            if not isinstance(model, LayeredModule):
                return {"logits": _size(model(batch))}
            stream = model.apply_layers(model.embed(batch), batch)[0]
            return {"residual stream": _size(stream), "logits": _size(model.output(stream))}
        finally:
            WATCH.reset(unset)

    with program.on_mesh:
        state = program.init(jax.random.key(run.seed))
        for step, host_batch in enumerate(batches):
            batch = put_like(host_batch, {name: program.validation_batch[name] for name in host_batch})
            layers.clear()
            found = jax.device_get(sizes(state.params, batch))
            jax.effects_barrier()
            yield {**{name: float(np.mean(each)) for name, each in layers.items()}, **found}
            if step < run.train.steps:
                state, _ = program.train_step(state, batch)


def _size(x: Any) -> jax.Array:
    return jnp.mean(jnp.abs((x.materialize() if isinstance(x, FactoredLogits) else x).astype(jnp.float32)))


def _batches(run: Run, prepare_command: str) -> list[Mapping[str, np.ndarray]]:
    """Returns the batches of the run, one more than steps; of random tokens if its data is not there."""
    count = run.train.steps + 1
    data = RunData(make_program(run), run, RunDirectory(f"{run.root}/{run.name}"), current_peers(), prepare_command)
    try:
        loader = data.training_batches(replace(run.train, steps=count), 0)
    except ConfigError as error:
        _log.warning("%s; taking random tokens", error)
        return [random_batch(run, seed) for seed in range(count)]
    return [loader[index][1] for index in range(count)]
