"""`Job`: what the functions of a training need to know of the run. Nothing of it is open yet."""

from dataclasses import dataclass, field

from jaxinfra.config import Loaded
from jaxinfra.processes.peers import Peers
from jaxinfra.processes.step_file import StepWriter
from jaxinfra.program import Program
from jaxinfra.run import Run
from jaxinfra.run_dir import RunDirectory
from jaxinfra.train.run_data import RunData
from jaxinfra.train.texts import Texts


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a `Trainer` was made from: all of it is there before a training, and after it.

    Attributes:
        loaded: the config as it was loaded, with the origin of each field.
        program: the compiled functions of the run, for the devices of all processes.
        run_dir: the directory of the run.
        data: the data of the run, as this process reads it.
        texts: samples and scores texts at each evaluation.
        peers: the processes of the run.
        command: the command line, for the run record.
        accept_change: whether a run that has begun may go on with a config that changes its numbers.
        step_writer: tells the supervisor which steps are complete.
    """

    loaded: Loaded[Run]
    program: Program
    run_dir: RunDirectory
    data: RunData
    texts: Texts
    peers: Peers
    command: tuple[str, ...] = ()
    accept_change: bool = False
    step_writer: StepWriter = field(default_factory=StepWriter)

    @property
    def run(self) -> Run:
        """The config, with the mesh sized for the devices."""
        return self.program.run

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which writes the run directory."""
        return self.peers.index == 0
