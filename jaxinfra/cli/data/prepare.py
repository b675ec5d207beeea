"""`python -m launch data prepare CONFIG`: make the data that a config describes."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from rich.filesize import decimal
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from jaxinfra.cli.arguments import ENGINES
from jaxinfra.config import load, validate
from jaxinfra.data.inspect import describe_manifest
from jaxinfra.errors import ConfigError, Preempted
from jaxinfra.prepare.follow import follow
from jaxinfra.prepare.prepare import Prepared, Progress, prepare
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.runtime.signals import StopRequest


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Makes each store that is described, and says what it holds; fails as `recipes` and `prepare`."""
    _check(options)
    if options.follow:
        return _follow(options)
    for corpus in recipes(options):
        validate(corpus)
        with bar() as tell:
            made = prepare(corpus, engine=options.engine or ENGINES[0], workers=options.workers, tell=tell)
        _say(made, "made")
        print("\n".join(describe_manifest(made.manifest)))
    return 0


def recipes(options: argparse.Namespace) -> list[Recipe]:
    """The recipe that the file is, or those of the stores that a run trains on; ConfigError where there are none."""
    config = load(options.config, options.overrides, imports=options.imports).run
    if isinstance(config, Recipe):
        return [config]
    from jaxinfra.run import Run  # imports jax, which a recipe has no use for

    if not isinstance(config, Run):
        raise ConfigError(f"{options.config}: is neither a recipe nor a run; name a file such as configs/data/NAME.py")
    if not (made := config.data.recipes):
        raise ConfigError(
            f"{options.config}: its data names no recipe; name the file of the recipe, or give each store its recipe"
        )
    found = []
    for store, path in made.items():
        if options.config.endswith(".json") and path not in options.imports:
            raise ConfigError(f"{options.config}: a record runs no recipe that you do not name; add --import {path}")
        recipe = load(path).run
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"{path}: is no recipe; name a file whose config() returns one")
        found.append(replace(recipe, store=store))
    return found


def _say(made: Prepared, new: str) -> None:
    there = "was there, and is the newest now" if made.moved else "was there"
    print(f"{new if made.new else there}: {made.path}", flush=True)


def _check(options: argparse.Namespace) -> None:
    if options.until_idle is not None and not options.until_idle > 0:
        raise ConfigError(f"--until-idle {options.until_idle}: must be above 0; use --until-idle 2")
    names = ("workers", "engine") if options.follow else ("until_idle", "seal_every")
    why = "a stream has one reader; leave it out" if options.follow else "is of streams; add --follow"
    for name in names:
        if (value := getattr(options, name)) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {why}")


def _follow(options: argparse.Namespace) -> int:
    """Reads a stream, and says of each version that it is sealed; fails as `follow`.

    Preempted where Ctrl-C or SIGTERM asked to stop; all that has come is kept.
    """
    (recipe, *others) = recipes(options)
    if others:
        raise ConfigError(f"{options.config}: names {1 + len(others)} recipes; follow one stream at a time")
    validate(recipe)
    made = None
    with StopRequest() as stop, bar(endless=True) as tell:
        versions = follow(
            recipe,
            stopping=lambda: stop.reason is not None,
            until_idle_s=options.until_idle,
            seal_every_tokens=options.seal_every,
            tell=tell,
        )
        try:
            for made in versions:
                _say(made, "sealed")
        except ConfigError as error:
            if stop.reason is None:
                raise
            raise Preempted(
                f"{stop.reason}: all that has come is kept, no version is made of it yet ({error}); start the same "
                "command to go on"
            ) from None
    if made is not None:
        print("\n".join(describe_manifest(made.manifest)))
    if stop.reason is not None:
        raise Preempted(f"{stop.reason}: all that has come is kept; start the same command to go on")
    return 0


@contextmanager
def bar(*, endless: bool = False) -> Iterator[Callable[[Progress], None]]:
    """A bar for each stage, with tokens a second and the time that is left, which no `endless` stream tells."""
    name, come = TextColumn("{task.description:<8}"), TextColumn("{task.fields[come]}")
    bars = Bars(name, BarColumn(), come, TimeElapsedColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        tasks: dict[str, TaskID] = {}

        def finish() -> None:
            for task in tasks.values():
                bars.update(task, total=1, completed=1)

        def tell(progress: Progress) -> None:
            if not tasks:
                stack.enter_context(bars)  # which writes a line even where nothing is told
            if progress.stage not in tasks:
                finish()
                tasks[progress.stage] = bars.add_task(progress.stage, total=None, come="")
            task = tasks[progress.stage]
            if progress.stage not in ("tokens", "images"):
                return
            come = decimal(progress.done) if endless else f"{decimal(progress.done)} of {decimal(progress.total)}"
            if progress.tokens:
                come += f", {progress.tokens / (bars.tasks[task].elapsed or 1e-9):,.0f} tokens/s"
            bars.update(task, completed=progress.done, total=None if endless else progress.total, come=come)

        yield tell
        finish()
