"""Samples and scores texts at each evaluation of a language model: `track.sample_prompt` and `train.eval_tasks`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from jaxinfra.config import Loaded
from jaxinfra.config.source import COMMAND_LINE
from jaxinfra.config.text import error_prefix
from jaxinfra.errors import ConfigError
from jaxinfra.inference.language_model import language_model, require_text
from jaxinfra.inference.sampler import Sampler
from jaxinfra.parallel.spec import Params
from jaxinfra.run import Run
from jaxinfra.tasks.harness import Tasks, is_standard_error

_log = logging.getLogger(__name__)


class Texts:
    """Samples texts and runs tasks with the model of a run; all processes must make the same calls."""

    def __init__(self, run: Run, loaded: Loaded[Run]):
        """Raises ConfigError if a run that asks for texts trains no language model.

        A prompt of a config file is only left out, with a warning: the file may have it from a config that it changes.
        """
        self._run, self._names, self.prompt = run, run.train.eval_tasks, run.track.sample_prompt
        self._sampler: Sampler | None = None
        self._tasks: Tasks | None = None
        if self._names:
            with error_prefix("train.eval_tasks: "):
                require_text(run)
        if self.prompt is not None:
            try:
                with error_prefix("track.sample_prompt: "):
                    require_text(run)
            except ConfigError as error:
                if loaded.origins.get("track.sample_prompt") == COMMAND_LINE:
                    raise
                self.prompt = None
                _log.warning("%s; no text is sampled", error)

    def load(self) -> None:
        """Loads the tasks before anything is compiled, so that a wrong name is an error now (see `Tasks`)."""
        if self._names:
            self._tasks = Tasks(self._names, needed_by="train.eval_tasks")
            self._tasks.check_room(language_model(self._run).max_length)

    def sample(self, params: Params) -> str | None:
        """Returns `track.sample_prompt` with the model's continuation; None without a prompt."""
        if self.prompt is None:
            return None
        with error_prefix("track.sample_prompt: "), self._sampler_of(params) as sampler:
            return sampler.continue_prompt(self.prompt)

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
