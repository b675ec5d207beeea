"""`python -m launch report RUN [RUN ...]`: writes the page of a run, or one page that compares several."""

import argparse
from dataclasses import replace

from jaxinfra.config.source import RECORD_FILE
from jaxinfra.errors import ConfigError
from jaxinfra.storage import outputs
from jaxinfra.storage.lease import current_owner
from jaxinfra.track.report import MAX_RUNS, REPORT_FILE, RunFiles, read_run, render_report
from jaxinfra.track.runs import local_files, no_run_error


def run(options: argparse.Namespace) -> None:
    """Writes the page and prints its path."""
    locations = list(dict.fromkeys(name.rstrip("/") for name in options.runs))
    if len(locations) > MAX_RUNS:
        raise ConfigError(f"report: {len(locations)} runs, a page compares up to {MAX_RUNS}; name fewer")
    runs = [_read(location) for location in locations]
    if len({each.name for each in runs}) < len(runs):  # such as runs of one config in two roots
        runs = [replace(run, name=location) for run, location in zip(runs, locations, strict=True)]
    folder, _, _ = locations[0].rpartition("/")
    default = f"{locations[0]}/{REPORT_FILE}" if len(runs) == 1 else f"{folder or '.'}/comparison.html"
    path = options.output or default
    outputs.write_text(path, render_report(runs))
    print(f"wrote {path}; open it in a browser")


def _read(location: str) -> RunFiles:
    with local_files(location) as folder:
        if not (folder / RECORD_FILE).exists():
            raise no_run_error(location)
        return read_run(folder, is_running=current_owner(location) is not None)
