"""The table and the plots of a sweep, from the files of its runs; uses no devices."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxinfra.config.source import RECORD_FILE
from jaxinfra.errors import StorageError
from jaxinfra.storage import outputs
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.files import file_exists
from jaxinfra.storage.location import is_remote
from jaxinfra.track.console import fitted_table, print_table, stdout_console
from jaxinfra.track.formatting import format_metric
from jaxinfra.track.runs import RunOverview, local_files, run_overview
from jaxinfra.track.terminal_plot import plot_curve

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The runs of a sweep, by name."""

    axes: Sequence[Sequence[str]]  # the fields that differ; those of one axis change together
    values: Mapping[str, Mapping[str, str]]  # the text of each field
    errors: Mapping[str, str]  # why a run has no result


def read_sweep(location: str) -> Sweep | None:
    """Reads the file of a sweep in a folder or below a URL; None if there is none, StorageError if it is damaged."""
    if not file_exists(f"{location}/{SWEEP_FILE}"):
        return None
    with local_files(location, (SWEEP_FILE,)) as folder:
        text = outputs.read_text(folder / SWEEP_FILE)
    try:
        return Sweep(**json.loads(text))
    except (ValueError, TypeError) as error:
        path = f"{location}/{SWEEP_FILE}"
        raise StorageError(f"{path}: damaged ({error}); delete it, and start the command of the sweep again") from error


def write_sweep(location: str, sweep: Sweep) -> None:
    """Writes the file of a sweep, and makes its folder."""
    if not is_remote(location):
        with storage_errors(location):
            Path(location).mkdir(parents=True, exist_ok=True)
    outputs.write_json(f"{location}/{SWEEP_FILE}", asdict(sweep))


def overview_of(location: str, name: str) -> RunOverview | None:
    """Reads the files of a run; None if it has not begun."""
    with local_files(path := f"{location}/{name}") as files:
        return run_overview(files, path) if (files / RECORD_FILE).exists() else None


def print_sweep(location: str, sweep: Sweep, *, plots: bool = False) -> None:
    """Prints a row for each run, in the order of the values, and marks the lowest loss; also plots the losses."""
    names = sorted(sweep.values, key=lambda name: [*map(_sort_key, sweep.values[name].values())])
    overviews = {name: overview_of(location, name) for name in names}
    losses = {name: _loss(each) for name, each in overviews.items() if name not in sweep.errors}
    best, rows = min(losses, key=losses.__getitem__, default=""), []
    for name, each in overviews.items():
        state = "failed" if name in sweep.errors else each.state.partition(":")[0] if each else "not begun"
        shown = [None, None] if each is None else [each.loss, each.last_validation]
        mark = "best" if name == best and math.isfinite(losses[name]) else ""
        shown = ["" if loss is None else format_metric(loss) for loss in shown]
        rows.append([*sweep.values[name].values(), state, *shown, mark])
    console, fields = stdout_console(), [field for axis in sweep.axes for field in axis]
    head = (*fields, "state", "train loss", "validation loss", "")
    print_table(console, fitted_table(console, head, rows, texts=("state", "")))
    if plots:
        _plot(sweep, losses)


def _loss(overview: RunOverview | None) -> float:
    """Returns the loss that counts, on the validation samples at the end; infinite without one."""
    loss = None if overview is None or overview.state != "finished" else overview.last_validation
    return math.inf if loss is None or math.isnan(loss) else loss


def _sort_key(text: str) -> tuple[float, str]:
    """Orders numbers by their size, and before words."""
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def _plot(sweep: Sweep, losses: Mapping[str, float]) -> None:
    """Plots the loss over the values of the last axis, once for each combination of the others."""
    (last, *_), curves = sweep.axes[-1], dict[str, dict[str, float]]()
    for name, loss in losses.items():
        group = " ".join(f"{path}={sweep.values[name][path]}" for axis in sweep.axes[:-1] for path in axis)
        curves.setdefault(group, {})[sweep.values[name][last]] = loss
    for group, curve in curves.items():
        lowest, points = min(curve, key=curve.__getitem__), [*enumerate(curve.values())]
        if math.isfinite(curve[lowest]) and len(points) > 1:
            print(f"Loss over {last}{group and f' at {group}'}: lowest at {lowest}, {format_metric(curve[lowest])}")
            is_ascii = "utf" not in (sys.stdout.encoding or "").lower()
            print(plot_curve(points, height=8, ascii=is_ascii, names=[*curve]))
