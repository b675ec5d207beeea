"""The options that say where a run goes. Imports nothing heavy."""

import argparse
import re
from typing import Any

from jaxinfra.cli.numbers import add_int, positive
from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.place import CLOUDS, KINDS, PlaceOptions

_OWN_OPTIONS = {
    f"--{name}" for name in ("array", "nodes", "output", "error", "job-name", "signal", "open-mode", "wrap")
}
_OWN_OPTIONS |= {"--requeue", "--no-requeue", "--clusters", "--cluster", "--ntasks", "--ntasks-per-node", "--parsable"}
_OWN_LETTERS = {"-a", "-N", "-o", "-e", "-J", "-M", "-n"}
_KINDS_OF = {  # kinds of places that take an option
    "hosts": ("ssh", "slurm"),
    "nodes": ("slurm",),
    "sbatch": ("slurm",),
    **dict.fromkeys(("create", "name", "project", "zone", "network", "internal_ips", "user", "ssh_key"), CLOUDS),
    **dict.fromkeys(("spot", "reservation", "image", "service_account"), (*CLOUDS, "k8s")),
    "address": ("ray",),
    "accelerator": ("k8s", "ray"),
    **dict.fromkeys(("workload", "context", "namespace", "queue", "priority", "topology"), ("k8s",)),
    **dict.fromkeys(("volumes", "node_selector"), ("k8s",)),
    "max_hours": ("ssh", "k8s", "ray", *CLOUDS),
    **dict.fromkeys(("workdir", "extra"), ("ssh", "slurm", *CLOUDS)),
}
_NAME = re.compile("[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_TIME = re.compile(r"(?:--time[= ]|-t) *(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")  # D-H[:M[:S]], M[:S] or H:M:S


def add_place(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a start elsewhere."""
    place = parser.add_argument_group("another place than this machine (docs/places.md)")
    what = "ssh: hosts that you have; slurm: a job of Slurm; k8s: Kubernetes; ray: a job of Ray; "
    what += "tpu-vm: a Cloud TPU VM; gce: Compute Engine"
    place.add_argument("--place", choices=KINDS, help=what)
    what = "ssh: the hosts, in the order of ranks, as ssh takes them; slurm: a login node (default: this machine)"
    place.add_argument("--hosts", metavar="HOST[,HOST...]", default="", help=what)
    add_int(place, "--nodes", 1, metavar="N", help="slurm: nodes of the job, with a process each")
    what = "slurm: an option of sbatch, such as --sbatch=--gpus-per-node=8; repeatable"
    place.add_argument("--sbatch", metavar="OPTION", action="append", default=[], help=what)
    what = "k8s, ray: the chips, such as v5p:4x4x4, 2xv5e:4x4, h100:2x8, or cpu:N for N pods or workers without"
    place.add_argument("--accelerator", metavar="CHIPS", default="", help=what)
    what = "ray: of the cluster's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS)"
    place.add_argument("--address", metavar="URL", default="", help=what)
    what = "k8s: what runs the pods (default: jobset)"
    place.add_argument("--kind", dest="workload", choices=("job", "jobset", "trainjob"), help=what)
    place.add_argument("--queue", metavar="NAME", default="", help="k8s: a LocalQueue of Kueue")
    place.add_argument("--priority", metavar="NAME", default="", help="k8s: a priority class of Kueue")
    what = "k8s: a label of nodes; Kueue puts the pods where its value is the same, if it can"
    place.add_argument("--topology", metavar="LABEL", default="", help=what)
    what = "k8s: a persistent volume claim and where the pods see it; repeatable"
    place.add_argument("--volume", dest="volumes", metavar="CLAIM:PATH", action="append", default=[], help=what)
    what = "k8s: take nodes with this label alone; repeatable"
    place.add_argument(
        "--node-selector", dest="node_selector", metavar="LABEL=VALUE", action="append", default=[], help=what
    )
    what = "k8s: of the kubeconfig (default: the current one)"
    place.add_argument("--context", metavar="NAME", default="", help=what)
    place.add_argument("--namespace", metavar="NAME", default="", help="k8s: (default: that of the context)")
    what = "make these chips, and delete them when the run ends: v6e-64, 2xv5e:4x4, tpu7x:4x4x4, h100:2x8"
    place.add_argument("--create", metavar="CHIPS", default="", help=what)
    what = "name of the TPU VM or instance group (with --create default: that of the run)"
    place.add_argument("--name", metavar="NAME", default="", help=what)
    place.add_argument("--project", metavar="ID", default="", help="of Google Cloud (default: that of gcloud)")
    place.add_argument("--zone", metavar="ZONE", default="", help="such as us-east5-a")
    place.add_argument("--spot", action="store_true", help="spot machines: cheaper, and may be taken away at any time")
    place.add_argument("--reservation", metavar="NAME", default="", help="make them in this reservation")
    what = "TPU runtime version or image of Compute Engine, in place of the usual one of the chip; k8s: the image"
    place.add_argument("--image", metavar="NAME", default="", help=what)
    what = "what hosts may do in the cloud (default: the project's default service account); k8s: its name (none)"
    place.add_argument("--service-account", metavar="EMAIL", default="", help=what)
    place.add_argument("--network", metavar="NAME", default="", help="of the cloud (default: default)")
    what = "make hosts without public addresses; this machine must reach the private ones"
    place.add_argument("--internal-ips", action="store_true", help=what)
    place.add_argument(
        "--user", metavar="NAME", default="", help="on hosts of a cloud (default: your name here, for root jaxinfra)"
    )
    what = "private key for hosts of a cloud (default: ~/.ssh/google_compute_engine)"
    place.add_argument("--ssh-key", metavar="FILE", default="", help=what)
    what = "longest wait for chips (default %(default)s)"
    place.add_argument("--wait-hours", type=positive("--wait-hours", "12"), metavar="H", default=24.0, help=what)
    what = "after which the run saves, ends, and what was made is deleted, even if this machine is gone"
    place.add_argument("--max-hours", type=positive("--max-hours", "12"), metavar="H", default=0.0, help=what)
    what = "folder on the hosts for code, Python and packages (default: ~/.cache/jaxinfra)"
    place.add_argument("--workdir", metavar="DIR", default="", help=what)
    what = "also install these packages; repeatable (those of the chips and of the trackers come by themselves)"
    place.add_argument("--extra", metavar="NAME", action="append", default=[], help=what)
    what = "a variable of the run on its hosts; UV_... and proxies also when packages are installed; repeatable"
    place.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], help=what)
    what = "a variable whose value is read here at each start, and recorded nowhere; repeatable"
    place.add_argument("--secret", metavar="NAME", action="append", default=[], help=what)
    what = "refuse to send code that differs from the commit"
    place.add_argument("--committed", action="store_true", help=what)
    what = "show every request, command and file, and do nothing"
    place.add_argument("--dry-run", action="store_true", help=what)
    what = "start the run and leave; `runs resume RUN` watches it, and makes lost hosts again"
    place.add_argument("--detach", action="store_true", help=what)


def _option(name: str) -> str:
    """Returns how an attribute is typed."""
    return {"workload": "--kind", "volumes": "--volume"}.get(name, f"--{name.replace('_', '-')}")


def is_elsewhere(options: argparse.Namespace) -> bool:
    """Returns whether a start goes to another place; raises ConfigError for options of a place without --place."""
    if options.place:
        return True
    parser = argparse.ArgumentParser()
    add_place(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(options, name) != default:
            option, override = _option(name), ""
            if name == "name":  # also a field of a run
                override = f"; overrides have no dashes: name={options.name}"
            raise ConfigError(f"{option}: is for a run elsewhere; say where with --place {', '.join(KINDS)}{override}")
    return False


def sbatch_word(word: str, value: str) -> str:
    """Returns an option of sbatch and its value, if it has one, as --sbatch takes them."""
    return f"--sbatch={word}{'=' * (word.startswith('--') and bool(value))}{value}"


def _time_limit_s(word: str) -> int:
    """Returns the time limit in an option of sbatch; 0 without one, and for a form that is left to sbatch."""
    if not (match := _TIME.fullmatch(word)):
        return 0
    days, first, second, third = (int(each or 0) for each in match.groups())
    has_hours = match[1] is not None or match[4] is not None
    return days * 86400 + (first * 60 + second) * (60 if has_hours else 1) + third


def place_options(options: argparse.Namespace) -> PlaceOptions:
    """Returns the options of the command line; raises ConfigError for those of another kind of place."""
    kind = options.place
    for name, kinds in _KINDS_OF.items():
        if kind not in kinds and (value := getattr(options, name)):
            word = "" if value is True else f" {value[0] if isinstance(value, list) else value}"
            raise ConfigError(f"{_option(name)}{word}: --place {kind} does not take it; leave it out")
    for name in ("spot", "reservation", "image", "service_account"):
        if getattr(options, name) and kind in CLOUDS and not options.create:
            raise ConfigError(f"--{name.replace('_', '-')}: is for what --create makes; leave it out, or add --create")
    if kind in CLOUDS and not options.zone:
        raise ConfigError(f"--place {kind}: which zone? add --zone, such as --zone us-east5-a")
    if kind in CLOUDS and not (options.create or options.name):
        raise ConfigError(f"--place {kind}: which machines? add --name of those that exist, or --create v6e-8")
    hosts = tuple(host.strip() for host in options.hosts.split(",") if host.strip())
    if kind == "ssh" and not hosts:
        raise ConfigError("--place ssh: which hosts? add --hosts HOST[,HOST...], as ssh takes them")
    if kind == "slurm" and len(hosts) > 1:
        raise ConfigError(f"--hosts {options.hosts}: --place slurm takes one login node; use --hosts {hosts[0]}")
    if kind == "slurm" and options.nodes is None:
        raise ConfigError("--place slurm: how many nodes? add --nodes, such as --nodes 4")
    for word in options.sbatch:
        if not word.startswith("-") or "\n" in word:
            raise ConfigError(f"--sbatch {word}: expected one option of sbatch; use --sbatch=--partition=NAME")
        if word.partition("=")[0] in _OWN_OPTIONS or word[:2] in _OWN_LETTERS:
            raise ConfigError(f"--sbatch {word}: the script of the job sets it; leave it out")
        if 0 < _time_limit_s(word) <= 600:
            fix = "give more than ten minutes, such as --sbatch=--time=12:00:00"
            raise ConfigError(f"--sbatch {word}: the job saves 300 s before its time limit; {fix}")
    if kind in ("k8s", "ray"):
        _check_scheduled(options)
    if kind == "k8s":
        _check_k8s(options)
    count, (least, most) = options.nodes or len(hosts), options.elastic or (0, 0)
    if kind in ("ssh", "slurm") and most not in (0, count):
        fix = f"--elastic {min(least, count)}..{count}, or {f'--nodes {most}' if options.nodes else f'{most} --hosts'}"
        raise ConfigError(f"--elastic {least}..{most}: hosts of this run, with a process each: {count}; use {fix}")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in (*_KINDS_OF, "wait_hours") if name != "extra"}
    chosen |= {name: tuple(getattr(options, name)) for name in ("sbatch", "volumes", "node_selector")}
    chosen |= {"hosts": hosts, "nodes": options.nodes or 0, "workload": options.workload or "jobset"}
    return PlaceOptions(kind=kind, **chosen)


def _check_scheduled(options: argparse.Namespace) -> None:
    """Raises ConfigError for what a cluster that places processes by their chips could not take."""
    kind = options.place
    if not options.accelerator:
        raise ConfigError(f"--place {kind}: which chips? add --accelerator, such as v5p:4x4x4, h100:2x8 or cpu:2")
    if options.elastic:
        fix = "leave --elastic out: the cluster starts what is lost again"
        raise ConfigError(f"--elastic {'..'.join(map(str, options.elastic))}: not with --place {kind}; {fix}")


def _check_k8s(options: argparse.Namespace) -> None:
    """Raises ConfigError for what a cluster of Kubernetes could not take."""
    if not options.image:
        fix = "add --image REGISTRY/NAME:TAG; launch/Dockerfile makes one"
        raise ConfigError(f"--place k8s: which image has Python and the packages? {fix}")
    if options.priority and not options.queue:
        raise ConfigError(f"--priority {options.priority}: is of Kueue; name its queue with --queue")
    if options.topology and not options.queue:
        raise ConfigError(f"--topology {options.topology}: is of Kueue; name its queue with --queue")
    if wrong := [word for word in options.volumes if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*:/.+", word)]:
        raise ConfigError(f"--volume {wrong[0]}: expected a claim and a path; use --volume shared:/shared")
    if wrong := [word for word in options.node_selector if not re.fullmatch("[^=]+=[^=]*", word)]:
        raise ConfigError(f"--node-selector {wrong[0]}: expected LABEL=VALUE; use --node-selector pool=training")
    for name in ("namespace", "queue", "priority"):
        if (word := getattr(options, name)) and not _NAME.fullmatch(word):
            raise ConfigError(f"--{name} {word}: expected a name of a-z, 0-9, - and .; use --{name} training")


def variables(words: list[str]) -> dict[str, str]:
    """Parses NAME=VALUE; raises ConfigError for another form."""
    for word in words:
        name, equals, _ = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--env {word}: expected NAME=VALUE; use --env UV_DEFAULT_INDEX=https://...")
    return dict(word.split("=", 1) for word in words)


def secrets(names: list[str], words: list[str]) -> list[str]:
    """Returns the names of `--secret`; raises ConfigError for a value, which is not shown, and for names of `--env`."""
    for name in names:
        if not name.isidentifier():
            name, equals, _ = name.partition("=")
            fix = f"export {name}=... here, and use --secret {name}" if equals and name else "use --secret HF_TOKEN"
            raise ConfigError(f"--secret {name}: expected the name of a variable alone; {fix}")
        if name in variables(words):
            raise ConfigError(f"--secret {name}: --env has it, too, and would show its value; leave one out")
    return names
