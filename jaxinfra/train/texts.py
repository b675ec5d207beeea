"""Samples and scores texts at each evaluation of a language model: `track.sample_prompt` and `train.eval_tasks`."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxinfra.config.text import error_prefix
from jaxinfra.inference.language_model import language_model, require_text
from jaxinfra.inference.sampler import Sampler
from jaxinfra.parallel.spec import Params
from jaxinfra.run import Run
from jaxinfra.tasks.harness import Tasks, is_standard_error


class Texts:
    """Samples texts and runs tasks with the model of a run; all processes must make the same calls."""

    def __init__(self, run: Run):
        """Raises ConfigError if a run that asks for texts trains no language model."""
        self._run, self._names = run, run.train.eval_tasks
        self._sampler: Sampler | None = None
        self._tasks: Tasks | None = None
        for field, wanted in (("track.sample_prompt", run.track.sample_prompt), ("train.eval_tasks", self._names)):
            if wanted:
                with error_prefix(f"{field}: "):
                    require_text(run)

    def load(self) -> None:
        """Loads the tasks before anything is compiled, so that a wrong name is an error now (see `Tasks`)."""
        if self._names:
            self._tasks = Tasks(self._names, needed_by="train.eval_tasks")
            self._tasks.check_room(language_model(self._run).max_length)

    def sample(self, params: Params) -> str | None:
        """Returns `track.sample_prompt` with the model's continuation; None without a prompt."""
        if (prompt := self._run.track.sample_prompt) is None:
            return None
        with error_prefix("track.sample_prompt: "), self._sampler_of(params) as sampler:
            return sampler.continue_prompt(prompt)

    def scores(self, params: Params) -> dict[str, float]:
        """Returns the metrics of `train.eval_tasks`, as "eval/TASK/METRIC"."""
        if self._tasks is None:
            return {}
        with self._sampler_of(params) as sampler:
            found = self._tasks.run(sampler)
        return {
            f"eval/{task}/{name}": float(value)
            for task, metrics in found.items()
            for name, value in metrics.items()
            if name != "samples" and not is_standard_error(name)
        }

    @contextmanager
    def _sampler_of(self, params: Params) -> Iterator[Sampler]:
        """Yields a sampler that holds the parameters within this context only.

        With pipeline stages they are a second copy, sharded anew for sampling.
        """
        if self._sampler is None:
            self._sampler = Sampler.from_params(self._run, params)
        else:
            self._sampler.set_params(params)
        yield self._sampler
        self._sampler.drop_params()
