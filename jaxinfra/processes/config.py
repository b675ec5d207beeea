"""How long each phase of a run may take before it counts as hung. Imports no JAX."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from jaxinfra.config.limits import PositiveFloat


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """How long a phase may take without progress before the run ends with code 77; see docs/watch.md.

    None sets no limit. The defaults are for large runs on slow storage: they end a run that hangs, and nothing else.

    Attributes:
        step_factor: of a step, in medians of the last hundred steps; not less than `step_s`.
        step_s: of a step, in seconds. The first step of a start has `compile_s`.
        compile_s: of the compilation and the first step.
        restore_s: of the restore of a checkpoint, or the initialization of the parameters.
        data_s: until a batch comes.
        save_s: for which a save blocks the training.
        evaluation_s: of an evaluation, with the sample that follows.
        other_s: of anything else, such as the report of a profile, or the end of the run.
        end_s: of the end of a run that was asked to stop, after its last save; such a run ends with 75.
    """

    step_factor: Annotated[float, Gt(1), Lt(1e6)] = 20.0
    step_s: PositiveFloat | None = 600.0
    compile_s: PositiveFloat | None = 14_400.0
    restore_s: PositiveFloat | None = 7200.0
    data_s: PositiveFloat | None = 3600.0
    save_s: PositiveFloat | None = 7200.0
    evaluation_s: PositiveFloat | None = 14_400.0
    other_s: PositiveFloat | None = 7200.0
    end_s: PositiveFloat | None = 90.0
