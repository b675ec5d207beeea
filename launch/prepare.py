"""`python -m launch prepare CONFIG`: make the data that a config trains on."""

import argparse
from collections.abc import Sequence

from launch import config_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    config_argument.add(parser)


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prepares the data and says what it holds."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from jaxinfra.config import validate

    run = config_argument.loaded(options).run
    validate(run)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        lines = run.parts.data.prepare(progress)
    print("\n".join(lines))
    return 0
