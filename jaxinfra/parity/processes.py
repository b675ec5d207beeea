"""Compares loss and gradients of several real processes with those of one process on the same mesh.

The devices of this machine are shared out over 2 and over 4 processes. Between processes, collectives of CPU devices
are gloo's: an all-reduce adds around a ring, a reduce-scatter by halves. Within one process XLA adds the devices one
after the other. So the process that they are compared with uses gloo, too, and must give the same bits; the column
"other order" has the differences from one process that uses XLA's own order.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager

import jax

from jaxinfra.launchers.local_processes import process_environments
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parity.meshes import (
    Arrays,
    MeshDifference,
    all_meshes,
    batch_gradients,
    chosen_meshes,
    load_on_mesh,
    mesh_difference,
    mesh_name,
    relative_differences,
)
from jaxinfra.parity.workers import call_in_all, worker_pool
from jaxinfra.processes.join import join

TOLERANCE = 1e-6
"""Largest difference of an array from one process with the same collectives; on CPUs it is 0."""
COUNTS = (2, 4)
"""Numbers of processes."""


def layout_meshes(num_devices: int) -> list[MeshConfig]:
    """Returns the meshes to compare: all devices on each axis in turn, and on three axes."""
    meshes = [mesh for mesh in all_meshes(num_devices) if max(mesh.sizes) == num_devices > 1]
    mixed = [MeshConfig(replica=2, fsdp=2, tensor=num_devices // 4)] if num_devices % 8 == 0 else []
    return [*meshes, *mixed]


def compare_layouts(configs: Sequence[str], overrides: Sequence[str], devices: str | None) -> Iterator[MeshDifference]:
    """Yields a row for each mesh and number of processes, as "fsdp=8, 2 x 4" for 2 processes with 4 devices each.

    Raises ConfigError before the first if a config does not fit one of the meshes, or if the devices cannot be shared.
    `devices` is the value of --devices.
    """
    with ExitStack() as stack:
        alone = stack.enter_context(processes([{}]))
        (num_devices,) = call_in_all(alone, jax.device_count)
        meshes = chosen_meshes(layout_meshes(num_devices), overrides)
        cases = [(config, tuple(overrides), mesh) for config in configs for mesh in meshes]
        for case in cases:
            load_on_mesh(*case)
        counts = [count for count in COUNTS if num_devices % count == 0]
        layouts = {
            count: stack.enter_context(processes(process_environments(count, devices))) for count in (1, *counts)
        }
        for case in cases:
            in_process = call_in_all(alone, _gradients, *case)[0]
            expected = call_in_all(layouts[1], _gradients, *case)[0]
            for count in counts:
                found = call_in_all(layouts[count], _gradients, *case)[0]
                name = f"{mesh_name(case[2])}, {count} x {num_devices // count}"
                differences = relative_differences(found, expected)
                yield mesh_difference(case[0], name, differences, relative_differences(found, in_process))


@contextmanager
def processes(environments: Sequence[Mapping[str, str]]) -> Iterator[list[ProcessPoolExecutor]]:
    """Starts a process for each environment, as a pool of one; a failure ends all of them.

    Those with the variables of `process_environments` join each other.
    """
    pools = [worker_pool(1, environment) for environment in environments]
    try:
        call_in_all(pools, _join)
        yield pools
    finally:
        for pool in pools:  # processes that have joined wait for each other at their end
            pool.shutdown(wait=False, cancel_futures=True)


def _gradients(config: str, overrides: tuple[str, ...], mesh: MeshConfig) -> Arrays:
    """Returns loss and gradients in process 0."""
    arrays = batch_gradients(load_on_mesh(config, overrides, mesh))
    return arrays if jax.process_index() == 0 else {}


def _join() -> None:
    """Joins the processes of the environment, if any; only so does one process use the collectives of several."""
    if "JAX_PROCESS_ID" not in os.environ:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo prints there whom it is connected to
    if os.environ["JAX_NUM_PROCESSES"] == "1":
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 1, 0, cluster_detection_method="deactivate")
    else:
        join()
