"""Shows what a start at a place would do: every request, command and file."""

import json
import shlex
from dataclasses import asdict

from jaxinfra.launchers.places.bundle import Bundle
from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.manifests import GRACE_S, manifests
from jaxinfra.launchers.places.place import Host
from jaxinfra.launchers.places.ray_submission import address_of, submission
from jaxinfra.launchers.places.requirements import requirements_of, uv_version
from jaxinfra.launchers.places.ssh_place import SshPlace
from jaxinfra.packages import import_optional


def print_manifests(job: Job) -> None:
    """Prints what a cluster of Kubernetes gets, as `kubectl apply -f` takes it, but for what a start knows."""
    yaml = import_optional("yaml", needed_by="--dry-run", install="jaxinfra[k8s]")
    shown = manifests(job, "attempt", grace_s=GRACE_S, left_s=job.place.max_hours * 3600)
    print(f"# run directory: {job.location}; it gets the code, place/bundle-{job.bundle}, at a start")
    print('# a start adds the Secret of this name, with --secret and a key; its number takes the place of "attempt"')
    print(yaml.safe_dump_all(shown, sort_keys=False), end="")


def print_submission(job: Job) -> None:
    """Prints what the Jobs API of a Ray cluster gets, with words in capitals for what a start knows."""
    shown = submission(job, "ATTEMPT", working_dir="CODE", left_s=job.place.max_hours * 3600)
    print(f"# run directory: {job.location}; it gets the code, place/bundle-{job.bundle}, at a start")
    print(f"POST {address_of(job.place) or 'http://HEAD:8265'}/api/jobs/    # after the code, as a package of Ray")
    print(json.dumps(shown, indent=2))


def print_plan(job: Job, place: SshPlace, bundle: Bundle, extras: list[str]) -> None:
    """Prints the plan; asks nobody, so HOST stands for all hosts of a cloud."""
    print(f"# run directory: {job.location}")
    print(f"# code: {bundle.text}; its files, as of git ls-files in {bundle.top}")
    for change in bundle.shown_changes:
        print(f"#   {change}")
    print("# packages, to be locked for the hosts' architecture, and those of their chips:")
    print(*(f"#   {line}" for line in sorted(requirements_of(extras))), sep="\n")
    for request in place.source.requests():
        print(f"\n{request.method} {request.url}    # {request.why}")
        print(request.body, end="\n" * bool(request.body))
    for url in place.source.deletion():
        print(f"\nDELETE {url}    # by the first host itself, if nobody does after the end, or at --max-hours")
    hosts = [Host(address=f"{job.place.user}@HOST")] if job.place.is_cloud else place.source.current()
    start, shown = place.dry_start(job)
    steps = [
        ("probe", job.id, job.bundle, "PACKAGES", uv_version(), job.place.kind),
        ("unpack", job.bundle),
        ("receive", f"bin/uv-{uv_version()}"),
        ("receive", "environments/PACKAGES/requirements.txt"),
        ("install", "PACKAGES", uv_version(), "PYTHON"),
        start,
    ]
    where = f"{hosts[0]}, the login node" if job.place.kind == "slurm" else "each host at once"
    for action in steps:
        print(f"\n# {action[0]}, on {where}")
        for host in hosts:
            print(shlex.join(place.ssh.command(host, *action, script="$(cat jaxinfra/launchers/places/host.sh)")))
    print(f"\n# file: {job.location}/place/bundle-{job.bundle}, place/requirements-PACKAGES")
    print(f"# file: {job.location}/place/attempt-N.json")
    print(json.dumps({"job": asdict(job)}, indent=2))
    print(f"\n{shown}")
