"""`python -m launch data prepare CONFIG`: make the data that a config describes."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from jaxinfra.cli import config_argument
from jaxinfra.errors import ConfigError, Preempted

if TYPE_CHECKING:
    from jaxinfra.prepare.prepare import Prepared, Progress

ENGINES = ("local", "ray", "dask", "spark")


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides, and where the work is done."""
    config_argument.add(parser, "a recipe such as configs/data/python_stdlib.py, or a run that names its recipes")
    parser.add_argument("--engine", choices=ENGINES, help="what runs the workers (default local)")
    config_argument.add_number(parser, "--workers", 1, metavar="N", help="so many at once (default: one a core)")
    follow = parser.add_argument_group("streams")
    follow.add_argument("--follow", action="store_true", help="read a stream (Stdin, Kafka) as it comes, up to its end")
    follow.add_argument("--until-idle", type=float, metavar="S", help="end when nothing has come for S seconds")
    help_text = "make a version of every N tokens that come, too"
    config_argument.add_number(follow, "--seal-every", 1, metavar="N", help=help_text)


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Makes each store that is described, and says what it holds.

    Raises:
        ConfigError: a recipe is wrong, or the config names none.
        JaxinfraError: see `data.prepare`.
    """
    from jaxinfra.config import validate
    from jaxinfra.data.inspect import facts
    from jaxinfra.prepare.prepare import prepare

    _check(options)
    if options.follow:
        return _follow(options)
    for corpus in config_argument.recipes(options):
        validate(corpus)
        with bar() as tell:
            made = prepare(corpus, engine=options.engine or ENGINES[0], workers=options.workers, tell=tell)
        print(f"{'made' if made.new else _was_there(made)}: {made.path}")
        print("\n".join(facts(made.manifest)))
    return 0


def _was_there(made: "Prepared") -> str:
    return "was there, and is the newest now" if made.moved else "was there"


def _check(options: argparse.Namespace) -> None:
    for name in ("workers", "engine", "until_idle", "seal_every"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if name == "until_idle" and value is not None and not value > 0:
            raise ConfigError(f"{option} {value}: must be above 0; use {option} 2")
        if value is not None and options.follow == (name in ("workers", "engine")):
            raise ConfigError(
                f"{option} {value}: {'a stream has one reader' if options.follow else 'is of streams'}; "
                f"{'leave it out' if options.follow else 'add --follow'}"
            )


def _follow(options: argparse.Namespace) -> int:
    """Reads a stream, and says of each version that it is sealed.

    Raises:
        ConfigError: the config is not the recipe of a stream.
        Preempted: Ctrl-C or SIGTERM asked to stop; all that has come is kept.
        JaxinfraError: see `data.follow`.
    """
    from jaxinfra.config import validate
    from jaxinfra.data.inspect import facts
    from jaxinfra.prepare.follow import follow
    from jaxinfra.runtime.signals import StopRequest

    (recipe, *others) = config_argument.recipes(options)
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
                print(f"{'sealed' if made.new else _was_there(made)}: {made.path}", flush=True)
        except ConfigError as error:
            if stop.reason is None:
                raise
            raise Preempted(
                f"{stop.reason}: all that has come is kept, no version is made of it yet ({error}); start the same "
                "command to go on"
            ) from None
    if made is not None:
        print("\n".join(facts(made.manifest)))
    if stop.reason is not None:
        raise Preempted(f"{stop.reason}: all that has come is kept; start the same command to go on")
    return 0


@contextmanager
def bar(*, endless: bool = False) -> Iterator[Callable[["Progress"], None]]:
    """A bar for each stage, with tokens a second and the time that is left where it can be told.

    Args:
        endless: the source is a stream, of which nobody knows how much will come.
    """
    from rich.filesize import decimal
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    name, come = TextColumn("{task.description:<8}"), TextColumn("{task.fields[come]}")
    bars = Bars(name, BarColumn(), come, TimeElapsedColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        tasks: dict[str, tuple[TaskID, float]] = {}

        def finish() -> None:
            for task, _ in tasks.values():
                bars.update(task, total=1, completed=1)

        def tell(progress: "Progress") -> None:
            if not tasks:
                stack.enter_context(bars)  # which writes a line even where nothing is told
            if progress.stage not in tasks:
                finish()
                tasks[progress.stage] = bars.add_task(progress.stage, total=None, come=""), time.monotonic()
            task, start_s = tasks[progress.stage]
            if progress.stage not in ("tokens", "images"):
                return
            come = decimal(progress.done) if endless else f"{decimal(progress.done)} of {decimal(progress.total)}"
            if progress.tokens:
                come += f", {progress.tokens / max(time.monotonic() - start_s, 1e-9):,.0f} tokens/s"
            bars.update(task, completed=progress.done, total=None if endless else progress.total, come=come)

        yield tell
        finish()
