"""Builds, traces and lowers every config on the abstract mesh that it asks for; prints what came of each.

python -m tests.program.lower_configs {trace | lower} CONFIG...
"""

import json
import math
import sys
from typing import Any

import jax

from jaxinfra.config import load, validate
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.program import Program
from jaxinfra.run import Run, with_mesh_size


def program(path: str, platform: str) -> Program:
    """The config's program; a mesh axis of -1 counts as one device. Options of a compiler change nothing here."""
    run = load(path, ["train.compiler=default"], root=Run).run
    run = with_mesh_size(run, math.prod(size for size in run.mesh.sizes if size != -1))
    validate(run)
    return Program(run, abstract_mesh(run.mesh), platform)


def traced(path: str) -> dict[str, Any]:
    built = program(path, "tpu")
    with built.on_mesh:
        built.train_step.trace(built.state, built.batch)
        built.eval_step.trace(built.state.params, built.batch, built.state.reference)
        built.init.trace(jax.eval_shape(lambda: jax.random.key(0)))
    return {"backend": _backend()}


def _backend() -> str | None:
    """The back end that JAX can start; None where there is none."""
    try:
        return jax.default_backend()
    except RuntimeError:
        return None


def lowered(path: str) -> dict[str, Any]:
    with jax.transfer_guard("disallow_explicit"):
        built = {platform: program(path, platform) for platform in ("cpu", "tpu")}
        text = {platform: one.lower().as_text() for platform, one in built.items()}
    partitions = built["tpu"].mesh.size
    return {
        "devices": jax.device_count(),
        "arrays": len(jax.live_arrays()),
        "partitions": {p: f"mhlo.num_partitions = {partitions} " in t for p, t in text.items()},
        "kernels": {p: "tpu_custom_call" in t for p, t in text.items()},
    }


if __name__ == "__main__":
    make = {"trace": traced, "lower": lowered}[sys.argv[1]]
    print(json.dumps({path: make(path) for path in sys.argv[2:]}))
