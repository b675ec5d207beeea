"""`python -m launch data prepare CONFIG`: make the data that a config describes."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxinfra.errors import ConfigError
from launch import config_argument

if TYPE_CHECKING:
    from jaxinfra.data.prepare import Progress

ENGINES = ("local", "ray", "dask", "spark")


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides, and where the work is done."""
    config_argument.add(parser, "a recipe such as configs/data/python_stdlib.py, or a run that names its recipes")
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="what runs the workers (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="so many at once (default: one a core)")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Makes each store that is described, and says what it holds.

    Raises:
        ConfigError: a recipe is wrong, or the config names none.
        JaxinfraError: see `data.prepare`.
    """
    from jaxinfra.config import validate
    from jaxinfra.data.facts import facts
    from jaxinfra.data.prepare import prepare

    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: must be at least 1; use --workers 2")
    for corpus in config_argument.recipes(options):
        validate(corpus)
        with bar() as tell:
            made = prepare(corpus, engine=options.engine, workers=options.workers, tell=tell)
        print(f"{'made' if made.new else 'was there'}: {made.path}")
        print("\n".join(facts(made.manifest)))
    return 0


@contextmanager
def bar() -> Iterator[Callable[["Progress"], None]]:
    """A bar for each stage, with tokens a second and the time that is left."""
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns) as bars:
        tasks: dict[str, tuple[TaskID, float]] = {}

        def tell(progress: "Progress") -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, speed=""), time.monotonic()
            task, start_s = tasks[progress.stage]
            speed = progress.tokens / max(time.monotonic() - start_s, 1e-9)
            shown = f"{speed:,.0f} tokens/s" if progress.tokens and progress.stage == "tokens" else ""
            bars.update(task, completed=progress.done, total=progress.total, speed=shown)

        yield tell
