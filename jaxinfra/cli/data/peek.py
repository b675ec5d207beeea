"""`python -m launch data peek CONFIG --step N --rank R --of P`: exactly what a process is fed at a step."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from jaxinfra.cli import config_argument
from jaxinfra.config import load, validate
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.data.prefetch import process_rows
from jaxinfra.data.store.store import PREPARE
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.program import Program
from jaxinfra.run import Run, with_mesh_size

_SAMPLES, _LARGEST_BATCH = 2**62, 2**24


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints the rows of the global batch that the process reads.

    The batch is cut into equal parts in the order of the ranks, as the rows of a mesh are whose batch axes come first.
    ConfigError where there is no such process, or the batch does not divide.
    """
    if options.rank >= options.of:
        raise ConfigError(f"--rank {options.rank}: of {options.of} processes; use --rank 0 to {options.of - 1}")
    data, global_batch, rows, hint = _what(options)
    if options.step >= (last := _SAMPLES // global_batch):
        raise ConfigError(f"--step {options.step}: samples are numbered in 62 bits; use --step {last - 1} or less")
    opened = data.open(hint=hint)
    ids = opened.sample_ids(options.step, global_batch)[rows]
    print(f"step {options.step}, process {options.rank} of {options.of}, {len(rows)} of {global_batch} rows")
    print("\n".join(opened.epochs_at(options.step, global_batch)))
    for row, sample in list(zip(rows, ids, strict=True))[: options.rows]:
        print("\n".join(opened.format_rows(sample[None], int(row), options.chars)))
    return 0


def _what(options: argparse.Namespace) -> tuple[DataConfig, int, np.ndarray, str]:
    """The data, the rows of a step and those of the process, and the command that makes the data."""
    config = load(options.config, options.overrides, imports=options.imports).run
    validate(config)
    size = options.global_batch
    if isinstance(config, Run):
        if size is not None:
            raise ConfigError(f"--global-batch {size}: {options.config} is a run; use train.global_batch={size}")
        rows, hint = rows_of(config, options.rank, options.of), config_argument.prepare_command(options, config)
        return config.data, config.train.global_batch, rows, hint
    if not hasattr(config, "modality") or not hasattr(config, "open"):
        raise ConfigError(f"{options.config}: is neither a run nor data; name a run such as configs/quickstart.py")
    if size is None or not 1 <= size <= _LARGEST_BATCH or size % options.of:
        raise ConfigError(
            f"--global-batch {size}: {options.config} is data alone, with no batch of its own; use --global-batch "
            f"{8 * options.of}"
        )
    part = size // options.of
    return config, size, np.arange(part * options.rank, part * (options.rank + 1)), PREPARE


def rows_of(run: Run, rank: int, of: int) -> np.ndarray:
    """The rows of the global batch that a process reads, sorted.

    Devices of the mesh belong to the processes in order, each to have as many; ConfigError where they do not divide.
    """
    fixed = math.prod(size for size in run.mesh.sizes if size != -1)
    devices = max(fixed, of)
    if devices % of:
        raise ConfigError(f"--of {of}: the {fixed} devices of the mesh are not shared evenly by {of}; use --of {fixed}")
    if fixed < of and -1 not in run.mesh.sizes:
        raise ConfigError(f"--of {of}: the mesh has {fixed} devices, fewer than processes; use mesh.fsdp={of}")
    run = with_mesh_size(run, devices)
    validate(run)
    mesh = make_mesh(run.mesh, [_Device(id=i, process_index=i // (devices // of), here=rank) for i in range(devices)])
    one = next(iter(Program(run, mesh).batch.values()))
    return process_rows(one.sharding, one.shape)


@dataclass(frozen=True, kw_only=True)
class _Device:
    """What a sharding asks of a device: who has it, and which process asks. JAX starts nothing for it."""

    id: int
    process_index: int
    here: int
    platform: str = "cpu"
    device_kind: str = "cpu"

    @property
    def client(self) -> SimpleNamespace:
        return SimpleNamespace(process_index=lambda: self.here)
