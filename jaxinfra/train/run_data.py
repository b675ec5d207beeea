"""The data of a run as this process reads it: the dataset, its batches, and their place on the devices."""

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
from jaxinfra.processes.peers import Peers
from jaxinfra.program import Program
from jaxinfra.run import Run, TrainConfig
from jaxinfra.run_dir import RunDirectory
from jaxinfra.track.formatting import format_bytes
from jaxinfra.track.memory import available_bytes
from jaxinfra.user_code import user_code_errors


class RunData:
    """The dataset of a run, and the rows of its batches that this process has.

    `config` is the run as it was loaded, to find the versions of the data that it has started with. `prepare_command`
    prepares the data, for the error message if the data is missing.
    """

    def __init__(
        self, program: Program, config: Run, run_dir: RunDirectory, peers: Peers, prepare_command: str | None
    ) -> None:
        self._program, self._run, self._peers = program, program.run, peers
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
        """Raises ConfigError if the host has too little memory for the batches of its processes.

        On CPUs the memory of the devices is that of the host: batches on devices and the train state count, too.
        """
        batch_bytes = sum(_local_bytes(array, copies=False) for array in self._program.batch.values())
        ahead, state_bytes = batches_ahead(self._run.data, batch_bytes), 0
        if self._program.partitioner.platform == "cpu":
            ahead += DEPTH
            state_bytes = sum(_local_bytes(array, copies=True) for array in jax.tree.leaves(self._program.state))
        host, available = self._peers.hosts[self._peers.index], available_bytes()
        sharing = self._peers.hosts.count(host)
        batches, state = sharing * (ahead + 1) * batch_bytes, sharing * state_bytes
        if batches + state <= available:
            return
        for_state = f" and {format_bytes(state)} for the train state" if state else ""
        needed = f"{format_bytes(batches)} for batches{for_state}"
        where = f"{host}: {format_bytes(available)} of memory are available, and its processes need {needed}"
        if state > batches:
            raise ConfigError(f"{where}; use a smaller model, or more hosts")
        batch = self._run.train.global_batch
        raise ConfigError(f"train.global_batch={batch}: {where}; use a smaller train.global_batch, or more hosts")

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows of a global batch that this process loads."""
        array = next(iter(self._program.batch.values()))  # all arrays of a batch have the same rows
        return process_rows(array.sharding, array.shape)

    def training_batches(self, config: TrainConfig, first_step: int) -> BatchLoader:
        """Returns the training batches of this process, from the step after `first_step` on.

        `config` has the batches to leave out, also those that the guard has decided on (`Numerics.train_config`).
        """
        return BatchLoader(
            self._run.data,
            self.dataset.train,
            global_batch=config.global_batch,
            rows=self.rows,
            start_step=first_step,
            steps=config.steps - first_step,
            sample_ids=lambda step, rows: self.dataset.sample_ids(config.batch_of_step(step), rows),
        )

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


def _local_bytes(array: jax.ShapeDtypeStruct, *, copies: bool) -> int:
    """Returns the bytes of the parts of a global array that the devices of this process hold.

    A part of which several devices have a copy counts once, or with `copies` as often as there are copies.
    """
    assert isinstance(array.sharding, Sharding)
    parts = [str(part) for part in array.sharding.addressable_devices_indices_map(array.shape).values()]
    num_parts = len(parts) if copies else len({*parts})
    return num_parts * math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
