"""`Trainer`: trains a run on the devices of all its processes.

`Trainer(run).train()` checks the config before it writes or compiles anything. Then it restores or initializes the
state, trains, evaluates, and saves (`training.py`).

All processes of a run make the same calls. Process 0 alone writes the run directory, apart from the shards of the
checkpoints, and what it reads there it tells the others.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import Loaded, validate
from jaxinfra.config.classes import ClassFinder
from jaxinfra.data.interfaces import Dataset
from jaxinfra.doctor.compare import check_hosts
from jaxinfra.errors import ConfigError
from jaxinfra.inference.sampler import Sampler
from jaxinfra.inference.trained_params import with_base
from jaxinfra.machine.compile_cache import compile_cache
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.processes.shared_reads import read_by_first
from jaxinfra.program import Program, TrainState
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.run_dir import RunDirectory, join_location
from jaxinfra.train.evaluation import evaluate, evaluated_params
from jaxinfra.train.job import Job
from jaxinfra.train.memory_check import check_evaluation, check_step, out_of_memory_errors
from jaxinfra.train.phases import Phases
from jaxinfra.train.reference_values import fill_references
from jaxinfra.train.run_data import RunData
from jaxinfra.train.run_record import existing_metrics, require_equal_processes
from jaxinfra.train.texts import Texts
from jaxinfra.train.training import preempted, train


class Trainer:
    """Trains a run.

    Attributes:
        run: the config, with the mesh sized for the devices.
        program: its compiled functions.
        run_dir: its directory.
        completed_steps: number of steps that the state was trained for.
        job: all that it was made from.
    """

    def __init__(
        self,
        run: Run | Loaded[Run],
        *,
        command: Sequence[str] = (),
        prepare_command: str | None = None,
        accept_change: bool = False,
    ):
        """Checks the config and builds the program; reads, writes and compiles nothing yet.

        Args:
            run: a config, or the result of `config.load`.
            command: the command line, for the run record.
            prepare_command: the command that prepares the data, for the error message if the data is missing.
            accept_change: whether a run that has begun may go on with a config that changes its numbers.
        """
        if not isinstance(run, Run | Loaded):
            raise TypeError(f"expected a Run, or what jaxinfra.load returns, found {type(run).__name__}")
        loaded = run if isinstance(run, Loaded) else Loaded(run=run, source="python", origins={})
        devices = all_devices()
        self.run = with_mesh_size(loaded.run, len(devices))
        validate(self.run)
        texts = Texts(self.run, loaded)
        self.program = Program(self.run, make_mesh(self.run.mesh, devices))
        peers = current_peers()
        self.run_dir = RunDirectory(join_location(self.run.root, self.run.name), peers)
        self.completed_steps = 0
        self.job = Job(
            loaded=loaded,
            program=self.program,
            run_dir=self.run_dir,
            data=RunData(self.program, loaded.run, self.run_dir, peers, prepare_command),
            texts=texts,
            peers=peers,
            command=tuple(command),
            accept_change=accept_change,
        )

    def train(self) -> dict[str, Any]:
        """Trains to the last step and returns the summary, as in summary.json.

        Resumes from the newest checkpoint of the run directory. On a request to stop it saves the state and raises
        Preempted; the same call resumes.
        """
        job = self.job
        check_hosts(job.peers, job.run_dir.location)
        with read_by_first(job.peers):
            _ = job.data.dataset
        job.data.check_host_memory()
        self.require_equal_processes()
        job.texts.load()
        vars(self).pop("state", None)  # the cached property: else the state would be on the devices twice
        ended = train(job)
        self.completed_steps = ended.step
        if ended.state is not None:
            self.state = ended.state
        if ended.reason is not None:
            raise preempted(job, ended.reason, ended.step)
        return ended.summary

    def compile(self) -> float:
        """Compiles the train step and the evaluation into the compile cache; returns the seconds that it took."""
        begin_s = time.monotonic()
        cache = compile_cache(self.run.train.compile_cache, exact_lines=self.run.profile.at is not None)
        with cache, self.program.on_mesh, out_of_memory_errors(self.job):
            check_step(self.job)
            check_evaluation(self.job)
        return time.monotonic() - begin_s

    def evaluate(self) -> dict[str, float]:
        """Returns the objective's metrics over all validation samples, each counted once, as "eval/NAME".

        Evaluates the averaged parameters if the run keeps them.
        """
        if (state := self._look_again()) is None:
            raise ConfigError(f"{self.run_dir.location}: has no parameters to evaluate yet; call train() first")
        with out_of_memory_errors(self.job):
            check_evaluation(self.job)
            init = self.job.peers.broadcast(self.run_dir.existing_record() if self.job.is_main else None).get("init")
            fill_references(self.job, init, Phases(), splits=("validation",))
            metrics = evaluate(self.job, state, self.completed_steps, Phases())
        assert metrics is not None, "without `stops`, nothing ends an evaluation early"
        return metrics

    @cached_property
    def state(self) -> TrainState | None:
        """The train state on the devices; before `train`, the newest checkpoint, or None without one."""
        if not self.run_dir.has_checkpoints():
            return None
        with self.program.on_mesh, CheckpointManager(self.run_dir.checkpoints, read_only=True) as checkpoints:
            if checkpoints.all_steps():
                self.run_dir.check(self.job.loaded.run, self.dataset)
            newest = checkpoints.newest(lambda step: checkpoints.restore(step, self.program.saved))
        if newest is None:
            self.completed_steps = 0
            return None
        self.completed_steps, state = newest
        return with_base(state, self.program, self.job.peers, self.run_dir.existing_record())

    def _look_again(self) -> TrainState | None:
        """Returns the state; if there was none, another process may have saved one since."""
        if self.state is None:
            del self.state
        return self.state

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The logged metrics of the run, one row per logged step, as in metrics.jsonl."""
        return existing_metrics(self.run_dir)

    @property
    def dataset(self) -> Dataset:
        """The data of the run, opened and checked; ConfigError if it is missing or does not fit the model."""
        return self.job.data.dataset

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Values of simple models on the validation split, by metric; they are known for the whole split only."""
        return self.job.data.baselines

    def sampler(self) -> Sampler:
        """Returns a sampler of the trained language model, with the averaged parameters if the run keeps them."""
        if (state := self._look_again()) is None:
            return Sampler.from_run(self.run_dir.location, ClassFinder.from_config(self.run))
        return Sampler.from_params(self.run, evaluated_params(state))

    def require_equal_processes(self) -> None:
        """Raises ConfigError if the processes of the run differ in what decides its numbers."""
        require_equal_processes(self.job.peers, self.job.loaded, self.dataset)
