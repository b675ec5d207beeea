"""`python -m launch CONFIG --place ...`: takes a run to other machines, and watches it there."""

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from jaxinfra.cli import config_argument
from jaxinfra.cli.places.arguments import place_options, secrets, variables
from jaxinfra.cli.places.dry_run import print_manifests, print_plan, print_submission
from jaxinfra.cli.places.lines import say, watching
from jaxinfra.command import command_line
from jaxinfra.config import validate
from jaxinfra.config.codec import encode
from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.bundle import Bundle, make_bundle
from jaxinfra.launchers.places.controller import Controller, release_last
from jaxinfra.launchers.places.google_cloud import check_key
from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.places.ray_submission import RAY_DRIVER
from jaxinfra.launchers.places.requirements import lock
from jaxinfra.launchers.places.run_files import HostFiles, files_of
from jaxinfra.launchers.places.sources import Chips, chips_made, num_devices, place_of
from jaxinfra.launchers.places.ssh_place import SshPlace
from jaxinfra.run import Run, with_mesh_size
from jaxinfra.run_dir import join_location
from jaxinfra.storage.location import is_remote


def run(options: argparse.Namespace) -> int:
    """Starts the run at its place; returns its exit code."""
    place_config = place_options(options)
    check_key(place_config)
    _check_processes(options)
    config = _load(options)
    location = _location(config, place_config)
    _check_stores(config, place_config)
    made = chips_made(place_config)
    devices = made.devices if made is not None else num_devices(place_config)
    if devices and not options.devices:
        validate(with_mesh_size(config, devices))
    bundle = make_bundle(Path.cwd(), committed=options.committed)
    job = Job(
        location=location,
        command=_command(options, bundle),
        folder=bundle.folder,
        place=place_config,
        bundle=bundle.hash,
        environment=variables(options.env),
        secrets=secrets(options.secret, options.env),
    )
    if options.dry_run and place_config.kind in ("k8s", "ray"):
        (print_manifests if place_config.kind == "k8s" else print_submission)(job)
        return 0
    place = place_of(job, say)
    job = replace(job, place=place.source.options)
    extras = [*options.extra, *_trackers(config)]
    if options.dry_run:
        assert isinstance(place, SshPlace)
        print_plan(job, place, bundle, [*extras, *(made.extras if made else place.extras(job))])
        return 0
    job.secret_values()
    say(f"code: {bundle.text}")
    for change in bundle.shown_changes:
        say(f"  {change}")
    attempts = Attempts(files=files_of(location, place_config.workdir), location=location)
    number, last = attempts.newest()
    if last is not None:
        release_last(place_of(last, say), last, number, job.place, say)
    controller = Controller(place, attempts, say)
    with watching(location):
        return _start(controller, attempts, job, number + 1, bundle, extras, detach=options.detach)


def _start(
    controller: Controller,
    attempts: Attempts,
    job: Job,
    number: int,
    bundle: Bundle,
    extras: list[str],
    *,
    detach: bool,
) -> int:
    place, made = controller.place, chips_made(job.place)
    if made is None:  # look at what exists before anything is recorded; what costs is recorded before it is made
        facts = place.prepare(job)
        made = Chips(arch=facts["arch"], extras=place.extras(job))
        if isinstance(attempts.files, HostFiles) and isinstance(place, SshPlace) and len(place.hosts) > 1:
            place.check_shared(attempts.files.path)
    attempts.keep("bundle", bundle.hash, bundle.content)
    if place.installs:
        packages = lock(sorted({*extras, *made.extras}), made.arch, job.uv_variables)
        attempts.keep("requirements", packages.hash, packages.requirements.encode())
        job = replace(job, packages=packages.hash, python=packages.python)
    job = replace(job, arch=made.arch, first=number)
    job = controller.start(job, number, is_new=True, prepared=not job.place.create)
    if detach:
        say(f"next: {command_line('runs', 'resume', job.location)} watches it, and makes lost hosts again")
        return 0
    return controller.follow(job, number)


def _check_processes(options: argparse.Namespace) -> None:
    """Raises ConfigError for options of this machine's processes."""
    if options.sweep:
        raise ConfigError(f"--sweep {options.sweep[0]}: trains on this machine; leave out --place")
    for name, none in (("processes", 1), ("coordinator", None), ("process_id", None), ("of", None)):
        if (value := getattr(options, name)) != none:
            option = f"--{name.replace('_', '-')} {value}"
            raise ConfigError(f"{option}: --place starts one process on each host; leave it out")


def _load(options: argparse.Namespace) -> Run:
    """Loads the config on the CPU of this machine, whatever the hosts have."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        config = config_argument.load_config(options).run
        validate(config)
    finally:
        if before is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = before
    return config


def _location(config: Run, place: PlaceOptions) -> str:
    """Returns the run directory, which must be where the hosts reach it."""
    if is_remote(config.root):
        return join_location(config.root, config.name)
    if not place.shares_disks:
        fix = "use a bucket, which outlives them: root=gs://BUCKET/runs"
        raise ConfigError(f"root={config.root}: a disk that this machine does not reach, or may be deleted; {fix}")
    if not os.path.isabs(config.root):
        shared = "/shared/runs" if place.hosts else os.path.abspath(config.root)
        fix = f"name a bucket or a folder that all hosts share: root={shared}"
        raise ConfigError(f"root={config.root}: the hosts do not have this folder; {fix}")
    path = join_location(config.root, config.name)
    return f"{place.hosts[0]}:{path}" if place.hosts else path


def _check_stores(config: Run, place: PlaceOptions) -> None:
    """Raises ConfigError for a store that the hosts cannot have."""
    for field, store in _stores(encode(config.data), "data"):
        if is_remote(store) or (place.shares_disks and os.path.isabs(store)):
            continue
        if any(store.startswith(volume.partition(":")[2]) for volume in place.volumes):
            continue
        prepare = command_line("data", "prepare", "CONFIG", f"{field}=gs://BUCKET/{store.strip('/')}")
        other = " or a folder that all hosts have" if place.shares_disks else ""
        if place.kind == "slurm" and not place.hosts and os.path.exists(store):
            prepare = f"{field}={os.path.abspath(store)}"
        raise ConfigError(f"{field}={store}: the hosts do not have it; use a bucket{other}: {prepare}")


def _stores(encoded: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(encoded, Mapping):
        for name, value in encoded.items():
            if name == "store" and isinstance(value, str):
                yield f"{path}.store", value
            yield from _stores(value, f"{path}.{name}")
    elif isinstance(encoded, list | tuple):
        for index, value in enumerate(encoded):
            yield from _stores(value, f"{path}.{index}")


def _trackers(config: Run) -> list[str]:
    """Returns the extras of the trackers that the run uses."""
    used = {"wandb": config.track.wandb.project, "mlflow": config.track.mlflow.uri}
    return [extra for extra, value in used.items() if value is not None]


def _command(options: argparse.Namespace, bundle: Bundle) -> list[str]:
    """Returns the words after the Python on a host: this command without its place, supervised, or by Ray."""

    def sent(path: str) -> str:
        """Returns the path of a file on the hosts: that below the code; a name that is no path stays."""
        if not os.path.exists(path):
            return path
        name = os.path.relpath(os.path.realpath(path), os.path.realpath(bundle.top))
        if name not in bundle.names and not os.path.isdir(path):
            raise ConfigError(f"{path}: is not sent; it must be below {bundle.top}, and not ignored by git")
        return os.path.relpath(path)

    words = [sent(options.config), *options.overrides]
    words += [word for each in options.imports for word in ("--import", sent(each))]
    words += ["--accept-change"] * options.accept_change
    words += ["--devices", options.devices] if options.devices else []
    is_ray = options.place == "ray"
    words += ["--supervise"] * (not is_ray) + ["--max-restarts-per-hour", str(options.max_restarts_per_hour)]
    if options.elastic is not None:
        words += ["--elastic", "..".join(map(str, options.elastic)), "--elastic-wait", str(options.elastic_wait)]
    words += ["--join-timeout", str(options.join_timeout), "--heartbeat-timeout", str(options.heartbeat_timeout)]
    return ["-m", RAY_DRIVER if is_ray else "jaxinfra.cli", *words]
