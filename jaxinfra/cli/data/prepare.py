"""`python -m launch data prepare CONFIG`: makes the stores that a recipe, or the recipes of a run, describe.

With --follow, it reads a stream and *seals* versions: each is a version of the store with all that has arrived so far.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxinfra.cli.arguments import ENGINES
from jaxinfra.cli.data.describe import describe_manifest
from jaxinfra.config import load, load_file, validate
from jaxinfra.config.overrides import read_overrides
from jaxinfra.config.schema import fields_of
from jaxinfra.config.source import find_record
from jaxinfra.errors import ConfigError, Preempted, quoted
from jaxinfra.prepare.follow import follow
from jaxinfra.prepare.prepare import PreparedVersion, PrepareProgress, pin_sources, prepare
from jaxinfra.prepare.recipes import Corpus, ImageSet, Recipe
from jaxinfra.processes.requests import StopRequest
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.storage.files import read_file

_MEASURED_STAGES = ("tokens", "images")  # stages that run jobs, whose progress is known in bytes


def run(options: argparse.Namespace) -> None:
    """Makes a version of each store and prints what it holds; raises as `load_recipes` and `prepare`."""
    _check_options(options)
    if options.follow:
        _follow(options)
        return
    engine = options.engine or ENGINES[0]
    for recipe, words in load_recipes(options):
        validate(recipe)
        recipe, snapshots = pin_sources(recipe)
        for override in snapshots:
            print(f"reads        {override}, the newest; add it to the command to read the same again", flush=True)
        made_from = mask_credentials(shlex.join([*words, *snapshots]))
        with progress_bar() as on_progress:
            version = prepare(
                recipe, engine=engine, workers=options.workers, on_progress=on_progress, prepared_from=made_from
            )
        _print_version(version, "made")
        print("\n".join(describe_manifest(version.manifest)))
        if version.manifest.counts.skipped:
            path = f"{version.path}/skipped.jsonl"
            first = json.loads(read_file(path, "the skipped records").splitlines()[0])
            print(f"skipped      {quoted(first['where'], 200)}: {quoted(first['cause'], 200)}; all are in {path}")


def load_recipes(options: argparse.Namespace) -> list[tuple[Recipe, Sequence[str]]]:
    """Loads the recipe of the config file, or the recipes of the stores that a run reads; ConfigError without one.

    Each comes with the words after `data prepare` that name it alone.
    """
    file = load_file(options.config, imports=options.imports)  # a run or a recipe
    if isinstance(file.run, Recipe):
        imports = [word for path in options.imports for word in ("--import", path)]
        return [(file.with_overrides(options.overrides).run, [options.config, *imports, *options.overrides])]
    from jaxinfra.run import Run  # imports jax, which a recipe does not need

    if not isinstance(file.run, Run):
        raise ConfigError(f"{options.config}: is neither a recipe nor a run; use a file such as configs/data/NAME.py")
    _check_fields_of_recipe(file.run.data.recipes, options.overrides, {field.name for field in fields_of(Run)})
    config = file.with_overrides(options.overrides).run
    if not (paths := config.data.recipes):
        raise ConfigError(
            f"{options.config}: its data names no recipe; use the file of the recipe, or set the recipe of each store"
        )
    recipes = []
    for store, path in paths.items():
        if find_record(options.config) is not None and path not in options.imports:
            fix = f"add --import {shlex.quote(path)}"
            raise ConfigError(f"{options.config}: a record runs no recipe that you do not name; {fix}")
        recipe = load(path).run
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"{path}: is not a recipe; use a file whose config() returns one")
        recipes.append((replace(recipe, store=store), [path, *([] if recipe.store == store else [f"store={store}"])]))
    return recipes


def _check_fields_of_recipe(recipes: Mapping[str, str], overrides: Sequence[str], fields_of_run: Set[str]) -> None:
    """Raises ConfigError for an override of a field that a recipe has, but a run has not."""
    fields_of_recipes = {field.name for recipe in (Corpus, ImageSet) for field in fields_of(recipe)}
    for override in read_overrides(overrides):
        name = override.path.partition(".")[0]
        if name in fields_of_recipes - fields_of_run:
            file = next(iter(recipes.values()), "RECIPE")
            raise ConfigError(f"{override}: {name} is a field of the recipe; use data prepare {file} {override}")


def _print_version(version: PreparedVersion, verb: str) -> None:
    if not version.new:
        verb = "was there, and is the newest now" if version.promoted else "was there"
    print(f"{verb}: {version.path}", flush=True)


def _check_options(options: argparse.Namespace) -> None:
    if options.until_idle is not None and not options.until_idle > 0:  # also rejects NaN
        raise ConfigError(f"--until-idle {options.until_idle}: must be above 0; use --until-idle 2")
    names = ("workers", "engine") if options.follow else ("until_idle", "seal_every")
    why = "a stream has one reader; leave it out" if options.follow else "is for streams; add --follow"
    for name in names:
        if (value := getattr(options, name)) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {why}")


def _follow(options: argparse.Namespace) -> None:
    """Follows a stream and prints each sealed version; raises as `follow`, and Preempted on Ctrl-C or SIGTERM."""
    ((recipe, _), *others) = load_recipes(options)
    if others:
        raise ConfigError(f"{options.config}: has {1 + len(others)} recipes, but only one stream can be followed")
    validate(recipe)
    version = None
    with StopRequest() as stop, progress_bar(endless=True) as on_progress:
        versions = follow(
            recipe,
            should_stop=lambda: stop.reason is not None,
            idle_timeout_s=options.until_idle,
            seal_every_tokens=options.seal_every,
            on_progress=on_progress,
        )
        try:
            for version in versions:
                _print_version(version, "sealed")
        except ConfigError as error:
            if stop.reason is None:
                raise
            raise Preempted(
                f"{stop.reason}: all that has arrived is kept, but in no version yet ({error}); start the same command "
                "to go on"
            ) from None
    if version is not None:
        print("\n".join(describe_manifest(version.manifest)))
    if stop.reason is not None:
        raise Preempted(f"{stop.reason}: all that has arrived is kept; start the same command to go on")


@contextmanager
def progress_bar(*, endless: bool = False) -> Iterator[Callable[[PrepareProgress], None]]:
    """Shows a bar for each stage, with tokens per second and, unless `endless`, the remaining time."""
    stage_column, text_column = TextColumn("{task.description:<8}"), TextColumn("{task.fields[text]}")
    bars = Progress(stage_column, BarColumn(), text_column, TimeElapsedColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        tasks: dict[str, TaskID] = {}

        def finish_all() -> None:
            for task in tasks.values():
                bars.update(task, total=1, completed=1)

        def on_progress(progress: PrepareProgress) -> None:
            if not tasks:
                stack.enter_context(bars)  # not earlier, because it prints a line even if nothing is reported
            if progress.stage not in tasks:
                finish_all()
                tasks[progress.stage] = bars.add_task(progress.stage, total=None, text="")
            task = tasks[progress.stage]
            if progress.stage not in _MEASURED_STAGES:
                return
            text = decimal(progress.done) if endless else f"{decimal(progress.done)} of {decimal(progress.total)}"
            if progress.tokens:
                text += f", {progress.tokens / (bars.tasks[task].elapsed or 1e-9):,.0f} tokens/s"
            bars.update(task, completed=progress.done, total=None if endless else progress.total, text=text)

        yield on_progress
        finish_all()
