"""`python -m launch runs --place tpu-vm|gce`: lists what runs have made in a project of a cloud, and what it costs."""

import argparse
import json
import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from jaxinfra.command import command_line
from jaxinfra.config.source import RECORD_FILE
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.launchers.places import gce, tpu_vm
from jaxinfra.launchers.places.google_cloud import located
from jaxinfra.launchers.places.place import PlaceOptions, Resource
from jaxinfra.machine.chips import CHIPS
from jaxinfra.plan.topology import Topology, parse_topology
from jaxinfra.storage.location import is_remote
from jaxinfra.track.console import fitted_table, print_table, stdout_console
from jaxinfra.track.formatting import format_age
from jaxinfra.track.runs import RunOverview, local_files, run_overview

_COLUMNS = ("run", "state", "step", "chips", "spot", "zone", "age", "cost", "notice", "name", "kind")
_TEXTS = ("run", "state", "chips", "spot", "zone", "notice", "name", "kind")
_READERS = 16  # run directories that are read at once
_HOUR_S = 3600.0
_EVERYWHERE = "-"  # as the zone of a list


def run(options: argparse.Namespace) -> None:
    """Prints a row for each resource, newest first."""
    prices = read_prices(options.prices) if options.prices else {}
    project, zone = _project(options), options.zone or _EVERYWHERE
    found = (tpu_vm if options.place == "tpu-vm" else gce).list_resources(project, zone)
    if not found:
        where = f"in {zone}" if options.zone else "in any zone"
        print(f"{project}: nothing that runs have made by --place {options.place} {where}, so nothing that costs")
        return
    found = sorted(found, key=_age_s)
    with ThreadPoolExecutor(_READERS) as pool:
        urls = sorted({each.run for each in found if is_remote(each.run)})
        overviews = dict(zip(urls, pool.map(_overview, urls), strict=True))
    console, rows = stdout_console(), [_cells(each, overviews.get(each.run), prices) for each in found]
    print_table(console, fitted_table(console, _COLUMNS, rows, texts=_TEXTS, wrapped="notice"))
    if prices:
        known = [cost for each in found if (cost := _cost_per_hour(each, prices)) is not None]
        unknown = len(found) - len(known)
        print(f"in all ${sum(known):,.2f}/h{f', without {unknown} of unknown price' if unknown else ''}")
    for location, overview in overviews.items():
        if overview is not None and overview.state != "running":
            state = overview.state.partition(":")[0]
            if state == "finished":
                print(f"next: {command_line('runs', 'stop', location)}    # finished, and what was made for it remains")
            else:
                goes_on = f"{state}: goes on, unless somebody watches it already; `runs stop` deletes what was made"
                print(f"next: {command_line('runs', 'resume', location)}    # {goes_on}")
    unread = [each for each in found if overviews.get(each.run) is None]
    if unread:
        print("Without a run that can be read here; a start that still waits or installs has none yet:")
    for location in dict.fromkeys(each.run for each in unread if is_remote(each.run)):
        print(f"next: {command_line('runs', 'resume', location)}    # goes on; `runs stop` deletes what was made")
    for each in unread:
        print(f"or: {_deletion(each, project)}")


def read_prices(path: str) -> Mapping[str, float]:
    """Reads a price file, JSON or TOML: US dollars of a chip for an hour, by its name, with "-spot" for spot chips.

    Raises ConfigError if it is none.
    """
    expected = 'expected dollars of a chip and hour, such as {"v6e": 2.7, "v6e-spot": 1.2}'
    try:
        text = Path(path).read_text(encoding="utf-8")
        parsed: object = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    except OSError as error:
        raise ConfigError(f"--prices {path}: {error.strerror}; {expected}") from None
    except ValueError as error:
        raise ConfigError(f"--prices {path}: {' '.join(str(error).split())}; {expected}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"--prices {path}: a {type(parsed).__name__}; {expected}")
    prices: dict[str, float] = {}
    for name, price in parsed.items():
        if str(name).removesuffix("-spot") not in CHIPS:
            raise ConfigError(f"--prices {path}: {name}: no such chip; use one of {', '.join(CHIPS)}, or with -spot")
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
            raise ConfigError(f"--prices {path}: {name}: {price!r}; {expected}")
        prices[str(name)] = float(price)
    return prices


def _project(options: argparse.Namespace) -> str:
    """Returns the project, that of the environment or of gcloud if none is named."""
    zone = options.zone or "us-central1-a"  # of no meaning: all zones are listed
    asked = PlaceOptions(kind=options.place, project=options.project, zone=zone, name="all")
    return located(asked, "").project


def _overview(location: str) -> RunOverview | None:
    """Reads a run's directory; None if it cannot be read, or if the run has not begun."""
    try:
        with local_files(location) as folder:
            return run_overview(folder, location) if (folder / RECORD_FILE).exists() else None
    except JaxinfraError:  # of the bucket: no rights, no such bucket, no packages; the list is about machines
        return None


def _cells(resource: Resource, overview: RunOverview | None, prices: Mapping[str, float]) -> Sequence[str]:
    topology, step, cost = _topology(resource), "", ""
    if overview is not None:
        total = "" if overview.total_steps is None else f"/{overview.total_steps:,}"
        step = f"{overview.completed_steps:,}{total}"
    if (per_hour := _cost_per_hour(resource, prices)) is not None:
        # It may have waited for its chips before, which costs nothing.
        cost = f"${per_hour:,.2f}/h, up to ${per_hour * _age_s(resource) / _HOUR_S:,.2f}" if per_hour else "nothing now"
    return [
        resource.run,
        resource.state,
        step,
        resource.chips if topology is None else str(topology),
        "spot" if resource.spot else "",
        resource.zone,
        format_age(_age_s(resource)) if resource.created else "",
        cost,
        resource.notice,
        resource.name,
        resource.kind,
    ]


def _deletion(resource: Resource, project: str) -> str:
    """Returns the command that deletes a resource, whatever its run says."""
    is_tpu = resource.kind == "queued resource"
    kind = "tpus queued-resources" if is_tpu else "instance-groups managed"
    force = " --force" if is_tpu else ""
    return f"gcloud compute {kind} delete {resource.name}{force} --zone={resource.zone} --project={project}"


def _topology(resource: Resource) -> Topology | None:
    """Returns the chips of a resource, which is one slice if it is a group; None if they are not known."""
    try:
        topology = parse_topology(resource.chips)
    except ConfigError:  # a name of the cloud's that this version does not know
        return None
    return replace(topology, slices=1) if resource.kind == "managed instance group" else topology


def _cost_per_hour(resource: Resource, prices: Mapping[str, float]) -> float | None:
    """Returns the dollars of an hour, 0 if no machine runs; None if the price is not known."""
    topology = _topology(resource)
    price = None if topology is None else prices.get(f"{topology.chip.name}{'-spot' if resource.spot else ''}")
    if topology is None or price is None:
        return None
    chips = topology.num_devices // topology.chip.devices_per_chip
    if resource.kind == "managed instance group":
        running, _, size = resource.state.partition(" RUNNING")[0].partition(" of ")
        return price * chips * int(running) / max(int(size), 1)
    return price * chips if resource.state in ("ACTIVE", "SUSPENDING", "DELETING") else 0.0


def _age_s(resource: Resource) -> float:
    """Returns the seconds since it was asked for."""
    return time.time() - datetime.fromisoformat(resource.created).timestamp() if resource.created else math.inf
