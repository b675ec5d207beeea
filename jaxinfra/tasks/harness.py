"""Loads tasks of lm-eval by name or file, and runs them on the mesh of a sampler.

All processes load the same tasks and make the same requests, and all get the results.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.inference.sampler import Sampler
from jaxinfra.packages import import_optional

_FEWSHOT_SEED = 1234  # the default of lm-eval's command
_BOOTSTRAPS = 1000  # of standard errors that have no formula

_MAX_TOKENS = 256  # the default of lm-eval
_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

type TaskResults = dict[str, dict[str, float]]
"""Metrics of each task or group, such as "acc" and its standard error "acc_stderr"."""

type Render = Callable[[Sequence[dict[str, Any]], bool], str]
"""Renders messages up to where the answer begins, or goes on if the last one begins it; ConfigError if it cannot."""


class Tasks:
    """Loaded tasks of lm-eval."""

    def __init__(self, names: Sequence[str], *, num_fewshot: int | None = None, needed_by: str = "--tasks"):
        """Loads tasks with their data, which may download it.

        Raises ConfigError if lm-eval is not installed or does not know a task, and DataError if the task cannot be
        loaded.

        Args:
            names: names of lm-eval, or files that end in .yaml.
            num_fewshot: examples in the prompts, where a task does not set 0; None is what the task sets.
            needed_by: the option or field that asks for the tasks.
        """
        self._needed_by = needed_by
        import_optional("lm_eval", "tasks", "evaluator", needed_by=needed_by, install="jaxinfra[eval]")
        self._loaded = _load(names, needed_by)
        for name, task in self._loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                kind = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "has images"
                raise ConfigError(f"{needed_by} {name}: {kind}; name tasks of text")
            default = task.get_config("num_fewshot")
            if default is None or (num_fewshot is not None and default != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)

    def check_room(self, max_length: int) -> None:
        """Raises ConfigError if a task generates so many tokens that a model has no room for a prompt."""
        for name, task in self._loaded["tasks"].items():
            tokens = max_new_tokens(task.config.generation_kwargs or {})
            if task.OUTPUT_TYPE == "generate_until" and tokens >= max_length:
                raise ConfigError(
                    f"{self._needed_by} {name}: generates {tokens} tokens, but the model was trained with {max_length} "
                    f"for prompt and text; set generation_kwargs.max_gen_toks of the task, such as to {max_length // 2}"
                )

    def run(
        self,
        sampler: Sampler,
        *,
        limit: int | None = None,
        render: Render | None = None,
        system: str | None = None,
    ) -> TaskResults:
        """Returns the metrics of all tasks.

        Args:
            sampler: the model.
            limit: a maximum of samples of each task.
            render: renders conversations, in which examples are earlier turns; None leaves prompts as text.
            system: what the first message says, before the description of a task.
        """
        self.check_room(sampler.model.max_length)
        evaluate = importlib.import_module("lm_eval.evaluator").evaluate
        model = importlib.import_module("jaxinfra.tasks.model").MeshLM(sampler, render)
        chat = dict.fromkeys(("apply_chat_template", "fewshot_as_multiturn"), render is not None)
        options = {"limit": limit, "bootstrap_iters": _BOOTSTRAPS, "log_samples": False, "system_instruction": system}
        with _no_progress_bars():
            found = evaluate(model, self._loaded, **options, **chat)
        samples = {name: {"samples": int(counts["effective"])} for name, counts in found["n-samples"].items()}
        return {name: samples.get(name, {}) | _metrics(values) for name, values in found["results"].items()}


def _load(names: Sequence[str], needed_by: str) -> dict[str, Any]:
    files = {name for name in names if name.endswith((".yaml", ".yml"))}
    if not sys.stderr.isatty():
        importlib.import_module("datasets").disable_progress_bars()
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=len(files) < len({*names}))
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name in files and not Path(name).is_file():
            raise ConfigError(f"{needed_by} {name}: no such file; name a YAML file of a task, or a task of lm-eval")
        if name not in files and name not in manager.task_index:
            similar = nearest(name, manager.all_tasks)
            fix = f"did you mean {similar}?" if similar else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"{needed_by} {name}: lm-eval has no such task, and a file ends in .yaml; {fix}")
        try:
            loaded = manager.load([name])
        except Exception as error:  # lm-eval and datasets may raise anything
            reason, fix = " ".join(str(error).split())[:300], "see the files of the task"
            cause = f"{type(error).__name__}: {reason}"
            raise DataError(f"{needed_by} {name}: cannot be loaded: {cause}; {fix}") from error
        if twice := [*(found["tasks"].keys() & loaded["tasks"])]:
            raise ConfigError(f"{needed_by} {name}: the task {twice[0]} is there twice; name it once")
        for part, new in loaded.items():
            found[part] |= new
    return found


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps lm-eval from drawing a bar for each task, for which it has no option."""
    module: Any = importlib.import_module("lm_eval.api.task")
    drawn = module.tqdm
    module.tqdm = partial(drawn, disable=True)
    try:
        yield
    finally:
        module.tqdm = drawn


def max_new_tokens(options: Mapping[str, Any]) -> int:
    """Returns the maximum number of tokens to generate from the options of a task."""
    return next((int(options[name]) for name in _MAX_TOKENS_NAMES if options.get(name)), _MAX_TOKENS)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a task: "acc" for "acc,none", and "exact_match/strict" for "exact_match,strict"."""
    found = {}
    for key, value in values.items():
        metric, comma, label = key.partition(",")
        if comma and isinstance(value, int | float):
            found[metric if label == "none" else f"{metric}/{label}"] = float(value)
    return found


def is_standard_error(metric: str) -> bool:
    """Tells whether a metric is the standard error of another one."""
    return metric.partition("/")[0].endswith("_stderr")
