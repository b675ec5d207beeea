"""`python -m launch data peek CONFIG --step N --rank R --of P`: prints exactly what process R of P reads at step N."""

import argparse
import math
from contextvars import copy_context
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from jaxinfra.cli import config_argument
from jaxinfra.config import load, validate
from jaxinfra.data.inspect import ALWAYS_IN_COLOR
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.data.prefetch import process_rows
from jaxinfra.data.store.store import PREPARE
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.program import Program
from jaxinfra.run import Run, with_mesh_size

_MAX_SAMPLES, _MAX_BATCH = 2**62, 2**24


def run(options: argparse.Namespace) -> None:
    """Prints the rows of the global batch that the process reads; ConfigError if there is no such process."""
    if options.rank >= options.of:
        raise ConfigError(f"--rank {options.rank}: of {options.of} processes; use --rank 0 to {options.of - 1}")
    data, global_batch, rows, hint, before = _data_and_rows(options)
    if options.step > (last := _MAX_SAMPLES // global_batch):
        raise ConfigError(f"--step {options.step}: samples are numbered in 62 bits; use --step {last} or less")
    opened = data.open(hint=hint)
    ids = opened.sample_ids(before, global_batch)[rows]
    print(f"step {options.step}, process {options.rank} of {options.of}, {len(rows)} of {global_batch} rows")
    print("\n".join(opened.epochs_at(before, global_batch)))
    context = copy_context()
    context.run(ALWAYS_IN_COLOR.set, options.mask)
    for row, sample in list(zip(rows, ids, strict=True))[: options.rows]:
        print("\n".join(context.run(list, opened.format_rows(sample[None], int(row), options.chars))))


def _data_and_rows(options: argparse.Namespace) -> tuple[DataConfig, int, np.ndarray, str, int]:
    """Returns data, global batch size, rows of the process, the command that prepares the data, and the batch.

    The batch is counted from 0, in the order of the data.
    """
    config = load(options.config, options.overrides, imports=options.imports).run  # a run or a data config
    validate(config)
    size = options.global_batch
    if isinstance(config, Run):
        if size is not None:
            raise ConfigError(f"--global-batch {size}: {options.config} is a run; use train.global_batch={size}")
        rows, hint = batch_rows(config, options.rank, options.of), config_argument.prepare_command(options, config)
        return config.data, config.train.global_batch, rows, hint, config.train.batch_of_step(options.step - 1)
    if not hasattr(config, "modality") or not hasattr(config, "open"):
        raise ConfigError(f"{options.config}: is neither a run nor data; use a run such as configs/quickstart.py")
    if size is None or not 1 <= size <= _MAX_BATCH or size % options.of:
        fix = f"use --global-batch {8 * options.of}"
        raise ConfigError(f"--global-batch {size}: {options.config} is data without a batch size; {fix}")
    num_rows = size // options.of  # each rank has a range of rows, as on a mesh whose first axes shard the batch
    return config, size, np.arange(num_rows * options.rank, num_rows * (options.rank + 1)), PREPARE, options.step - 1


def batch_rows(run: Run, rank: int, of: int) -> np.ndarray:
    """Returns the rows of the global batch that process `rank` reads, sorted.

    The devices of the mesh are assigned to the processes in order; ConfigError if they cannot be divided equally.
    """
    fixed = math.prod(size for size in run.mesh.sizes if size != -1)  # devices, without the axis that takes the rest
    devices = max(fixed, of)
    if devices % of:
        raise ConfigError(f"--of {of}: the {fixed} devices of the mesh cannot be divided by {of}; use --of {fixed}")
    if fixed < of and -1 not in run.mesh.sizes:
        raise ConfigError(f"--of {of}: the mesh has only {fixed} devices, fewer than processes; use mesh.fsdp={of}")
    run = with_mesh_size(run, devices)
    validate(run)
    per_process = devices // of
    all_devices = [_Device(id=i, process_index=i // per_process, current_process=rank) for i in range(devices)]
    mesh = make_mesh(run.mesh, all_devices)
    array = next(iter(Program(run, mesh).batch.values()))
    return process_rows(array.sharding, array.shape)


@dataclass(frozen=True, kw_only=True)
class _Device:
    """Has the attributes of a JAX device that a sharding reads, so that no backend is started."""

    id: int
    process_index: int  # of the process that the device belongs to
    current_process: int
    platform: str = "cpu"
    device_kind: str = "cpu"

    @property
    def client(self) -> SimpleNamespace:
        return SimpleNamespace(process_index=lambda: self.current_process)
