"""Finds what differs between the runs of one config file, from their records. Imports no JAX."""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from jaxinfra.track.runs import RunOverview

_LEFT_OUT = ("name", "root", "track", "profile", "watchdog")  # say where a run writes, not what it trains


def differences(runs: Sequence[RunOverview]) -> list[str]:
    """Returns what differs in each run from the others of its config file: "peak_lr=0.003 train.steps=60".

    A field is shown if the runs that have it have different values, but not in those that have the most common value.
    Its name is as short as it can be without being that of another field, too.
    """
    groups = defaultdict[str, list[RunOverview]](list)
    for run in runs:
        groups[os.path.normpath(run.source)].append(run)
    shown = {id(run): text for group in groups.values() for run, text in zip(group, _in_group(group), strict=True)}
    return [shown[id(run)] for run in runs]


def _in_group(runs: Sequence[RunOverview]) -> list[str]:
    values = defaultdict[str, Counter[str]](Counter)
    for run in runs:
        for path, text in run.config.items():
            values[path][text] += 1
    names, usual = dict[str, str](), dict[str, str]()
    for path, counts in values.items():
        if len(counts) > 1 and path.partition(".")[0] not in _LEFT_OUT:
            names[path] = _short_name(path, values)
            (text, count), (_, next_count) = counts.most_common(2)
            if count > next_count:
                usual[path] = text
    return [
        " ".join(
            f"{name}={run.config[path]}"
            for path, name in names.items()
            if path in run.config and run.config[path] != usual.get(path)
        )
        for run in runs
    ]


def _short_name(path: str, paths: Collection[str]) -> str:
    """Returns the shortest end of a path that no other path has; it does not begin with an index."""
    parts = path.split(".")
    for start in reversed(range(1, len(parts))):
        end = ".".join(parts[start:])
        if not parts[start].isdigit() and not any(
            other == end or other.endswith(f".{end}") for other in paths if other != path
        ):
            return end
    return path
