"""The meshes on which a run goes on when it has fewer hosts, or more again. Imports no JAX."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.run import Run, with_mesh_size


def elastic_overrides(run: Run, least: int, most: int, devices_per_host: int) -> Mapping[int, Sequence[str]]:
    """Returns the overrides with which a run trains on each number of hosts that it can be divided among.

    One data-parallel axis of the mesh shrinks and grows: the one that is -1, else `replica` if there are several, else
    `fsdp`. The global batch stays as it is. A device computes no more rows at once than with the most hosts: there are
    more microbatches instead. In canonical mode only powers of two of devices share the virtual shards.

    Args:
        run: a valid config.
        least: the fewest hosts.
        most: the most hosts, which the mesh of the config is for.
        devices_per_host: devices of each host.

    Raises:
        ConfigError: the run does not train on the most hosts, or has no axis that can shrink.
    """
    whole = with_mesh_size(run, most * devices_per_host)
    validate(whole)
    axis, most_rows = _elastic_axis(run.mesh), _rows_at_once(whole)
    found: dict[int, Sequence[str]] = {}
    for hosts in range(most, least - 1, -1):
        try:
            mesh = replace(whole.mesh, **{axis: -1}).resolve(hosts * devices_per_host)
        except ConfigError:  # the other axes need more devices
            continue
        if (fitting := _with_fewer_rows(replace(whole, mesh=mesh), most_rows)) is not None:
            accumulate = fitting.train.accumulate
            more = [f"train.accumulate={accumulate}"] if accumulate != run.train.accumulate else []
            found[hosts] = [f"mesh.{axis}={getattr(mesh, axis)}", *more] if hosts < most else []
    return found


def _elastic_axis(mesh: MeshConfig) -> str:
    axes = "replica", "fsdp", "expert"
    if free := [axis for axis in axes if getattr(mesh, axis) == -1]:
        return free[0]
    if larger := [axis for axis in axes[:2] if getattr(mesh, axis) > 1]:
        return larger[0]
    raise ConfigError(
        "--elastic: the mesh has no axis that shrinks with the hosts; use mesh.replica=-1 or mesh.fsdp=-1, with fixed "
        "sizes of the others"
    )


def _rows_at_once(run: Run) -> float:
    """Returns the rows that a device, or the devices that share them, compute at once."""
    return run.train.global_batch / (run.mesh.shards(*run.rules.batch) * run.train.accumulate)


def _with_fewer_rows(run: Run, most_rows: float) -> Run | None:
    """Returns a run with as many microbatches as it needs to compute at most these rows at once; None if none fits."""
    rows, remainder = divmod(run.train.global_batch, run.mesh.shards(*run.rules.batch))  # of a device and a step
    for accumulate in range(run.train.accumulate, rows + 1):
        if remainder or rows % accumulate:
            continue
        fitting = replace(run, train=replace(run.train, accumulate=accumulate))
        if run.train.canonical is None and _rows_at_once(fitting) > most_rows:
            continue
        try:
            validate(fitting)
        except ConfigError:
            if run.train.canonical is not None:  # which has virtual shards in place of microbatches
                return None
            continue
        return fitting
    return None
