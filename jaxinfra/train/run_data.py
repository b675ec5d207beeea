"""The data of a run as its processes read it."""

import math
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Sharding

from jaxinfra.command import COMMAND
from jaxinfra.data.batches import BatchLoader, batches_ahead, check_batch, validation_batches
from jaxinfra.data.interfaces import Batch, Dataset
from jaxinfra.data.prefetch import DEPTH, process_rows, to_global
from jaxinfra.errors import ConfigError
from jaxinfra.inference.trained_params import check_source
from jaxinfra.processes.peers import current_peers
from jaxinfra.program import Program
from jaxinfra.run import Run
from jaxinfra.run_dir import RunDirectory
from jaxinfra.track.formatting import format_bytes
from jaxinfra.track.memory import available_bytes
from jaxinfra.user_code import user_code_errors


class RunData:
    """The dataset of a run, and the rows of its batches that this process has.

    Args:
        program: of the run.
        config: the run as it was loaded, to find the versions of the data that it has started with.
        run_dir: its directory.
        prepare_command: the command that prepares the data, for the error message if the data is missing.
    """

    def __init__(self, program: Program, config: Run, run_dir: RunDirectory, prepare_command: str | None) -> None:
        self._program, self._run = program, program.run
        self._config, self._run_dir, self._prepare_command = config, run_dir, prepare_command

    @cached_property
    def dataset(self) -> Dataset:
        """The data, opened and checked; ConfigError if it is missing or does not fit the model."""
        recipe = next(iter(self._run.data.recipes.values()), "RECIPE")
        hint = self._prepare_command or f"{COMMAND} data prepare {recipe}"
        with user_code_errors(type(self._run.data), "data"):
            versions = self._run_dir.data_versions(self._config)
            dataset = self._run.data.with_versions(versions).open(hint=hint)
            dataset.check(self._run.model)
            if self._run.init is not None and not self._run_dir.existing_record():
                check_source(self._run.init, self._run, dataset)
            dataset.validation()  # raises if there are no validation samples
        return dataset

    def check_host_memory(self) -> None:
        """Raises ConfigError, in all processes, if a host has too little memory for the batches of its processes.

        On CPUs the batches on the devices and the train state are there, too.
        """
        batch_bytes = sum(map(_process_bytes, self._program.batch.values()))
        ahead, state_bytes = batches_ahead(self._run.data, batch_bytes), 0
        if self._program.partitioner.platform == "cpu":
            ahead += DEPTH
            state_bytes = sum(map(_device_bytes, jax.tree.leaves(self._program.state)))
        peers = current_peers()
        needs = peers.gather(((ahead + 1) * batch_bytes, state_bytes, available_bytes()))
        for host in dict.fromkeys(peers.hosts):
            of_host = [need for need, each in zip(needs, peers.hosts, strict=True) if each == host]
            batches, state = (sum(need[part] for need in of_host) for part in (0, 1))
            available = of_host[0][2]
            if batches + state > available:
                raise ConfigError(_too_large(self._run.train.global_batch, batches, state, available, host))

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows of a global batch that this process loads."""
        array = next(iter(self._program.batch.values()))  # all arrays of a batch have the same rows
        return process_rows(array.sharding, array.shape)

    @cached_property
    def validation(self) -> BatchLoader:
        """The validation batches, the same at every evaluation."""
        config = self._run.train
        samples = self.dataset.validation(config.eval_samples)
        return validation_batches(self._run.data, samples, global_batch=config.global_batch, rows=self.rows)

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Values of simple models on the validation split, by metric; they are known for the whole split only."""
        all_baselines = self.dataset.baselines if self._run.train.eval_samples is None else {}
        return {metric: dict(values) for metric, values in all_baselines.items()}

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """Moves the rows of this process onto its devices; returns the global batch."""
        check_batch(batch, self._run.data, len(self.rows))
        shardings = {name: array.sharding for name, array in self._program.validation_batch.items()}
        return to_global(batch, shardings, global_batch=self._run.train.global_batch)


def _too_large(global_batch: int, batches: int, state: int, available: int, host: str) -> str:
    for_state = f" and {format_bytes(state)} for the train state" if state else ""
    needed = f"{format_bytes(batches)} for batches{for_state}"
    where = f"{host}: {format_bytes(available)} of memory are available, and its processes need {needed}"
    if state > batches:
        return f"{where}; use a smaller model, or more hosts"
    return f"train.global_batch={global_batch}: {where}; use a smaller train.global_batch, or more hosts"


def _device_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes that the devices of this process hold of a global array, copies included."""
    assert isinstance(array.sharding, Sharding)
    devices = len(array.sharding.addressable_devices_indices_map(array.shape))
    return devices * math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _process_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of the parts of a global array that the devices of this process hold, each part once."""
    assert isinstance(array.sharding, Sharding)
    parts = {str(part) for part in array.sharding.addressable_devices_indices_map(array.shape).values()}
    return len(parts) * math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
