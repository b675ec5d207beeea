"""`runs logs RUN`: shows what a rank of a run at a place has printed."""

import argparse

from jaxinfra.cli.places.find import find
from jaxinfra.cli.places.lines import say
from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.ssh import after_mark
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore


def run(options: argparse.Namespace) -> None:
    """Prints what a rank has printed: from its host, or from the run directory if that is gone."""
    controller, job, number = find(options)
    place = controller.place
    place.hosts = place.source.current()
    if place.hosts:
        if options.rank >= (count := place.ranks(job)):
            raise ConfigError(f"--rank {options.rank}: the run has {count} hosts; use 0 to {count - 1}")
        lines, printed = "+1" if options.lines is None else str(options.lines), 0
        with place.console(job, rank=options.rank, lines=lines, follow=options.follow) as process:
            for line in after_mark(process):
                printed += 1
                print(line, end="", flush=True)
        if process.returncode == 0:
            if not printed:
                for_all = "; rank 0 prints for all" if options.rank else ""
                say(f"rank {options.rank} has printed nothing that is still there{for_all}")
            return
    if not is_remote(job.location):
        raise ConfigError(f"{job.location}: rank {options.rank} has no console of attempt {number} on its host")
    _from_bucket(job, options.rank, options.lines)


def _from_bucket(job: Job, rank: int, lines: int | None) -> None:
    """Prints the copy in the bucket of the rank's newest start."""
    store = ObjectStore(f"{job.location}/logs")
    names = [name for name in store.list_names() if name.partition("/")[2].startswith(f"rank-{rank}.log")]
    if not names:
        raise ConfigError(f"{job.location}/logs: no log of rank {rank} yet; it begins with the run")
    newest = max(names).partition("/")[0]
    say(f"this is {job.location}/logs/{newest}, copied every ten seconds")
    parts = sorted((each for each in names if each.startswith(f"{newest}/")), key=lambda name: (len(name), name))
    text = b"".join(map(store.read, parts)).decode(errors="replace").splitlines()
    print(*(text if lines is None else text[max(0, len(text) - lines) :]), sep="\n")
