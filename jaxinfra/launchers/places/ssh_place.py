"""Runs a job on hosts that ssh reaches, wherever these come from: the verbs of every place."""

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import override

from jaxinfra.errors import ConfigError, PeerLostError, RunInUseError
from jaxinfra.launchers.places.base import Place
from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.on_host import RUN_DIR, HostJob
from jaxinfra.launchers.places.place import Host, HostSource, HostState, Say
from jaxinfra.launchers.places.requirements import uv_for, uv_version
from jaxinfra.launchers.places.run_files import split_location
from jaxinfra.launchers.places.ssh import Ssh, Unreachable, on_all

PORT = 8476  # of process 0, as of JAX on Cloud TPU
_NEEDED_GIB = 6  # for a Python, its packages and their cache
_BOOT_S = 600.0  # from when a cloud says that a machine is ready until ssh answers
_SEND_S = 3600.0  # the longest transfer or installation
_POLL_S = 2.0


class SshPlace(Place):
    """A run on hosts that ssh reaches."""

    def __init__(self, source: HostSource, ssh: Ssh, say: Say) -> None:
        """Connects nothing yet."""
        super().__init__(source, say)
        self.ssh = ssh
        self._facts: Mapping[Host, Mapping[str, str]] = {}
        self._probed: str | None = None  # packages that the facts are about

    @property
    @override
    def started(self) -> str:
        names = ", ".join(map(str, self.hosts[:4])) + (", ..." if len(self.hosts) > 4 else "")
        return f"runs on {len(self.hosts)} host{'s' * (len(self.hosts) > 1)}: {names}"

    @override
    def prepare(self, job: Job, *, go_on: Callable[[], bool] = lambda: True) -> Mapping[str, str]:
        """Finds or makes the hosts, checks each one, and returns facts of the first.

        Hosts of a cloud may be booting, so they are waited for. Raises an error that names every host that is
        unreachable, of another architecture or driver than the first, or that another run has.
        """
        self.hosts = self.source.acquire(self._say, go_on)
        deadline_s, told = time.monotonic() + (_BOOT_S if job.place.is_cloud else 0.0), False
        while True:
            try:
                self._probe(job)
                break
            except Unreachable as error:
                if time.monotonic() > deadline_s or not go_on():
                    raise
                if not told:
                    self._say(f"waiting for ssh: {error}")
                told = True
                time.sleep(_POLL_S)
        self._check(job)
        return self._facts[self.hosts[0]]

    @override
    def extras(self, job: Job) -> Sequence[str]:
        if not self.hosts:
            return ()
        facts = self._facts[self.hosts[0]]
        return ("tpu",) * (facts["tpus"] != "0") or ("cuda",) * bool(facts["gpus"])

    def _probe(self, job: Job) -> None:
        def ask(host: Host) -> Mapping[str, str]:
            arguments = (job.id, job.bundle, job.packages or "-", uv_version(), job.place.kind)
            lines = (self.ssh.call(host, "probe", *arguments, timeout_s=60) or b"").decode(errors="replace")
            return dict(line.split("=", 1) for line in lines.splitlines() if "=" in line)

        self._facts, self._probed = on_all(self.hosts, ask), job.packages

    def _check(self, job: Job) -> None:
        first, problems = self._facts[self.hosts[0]], list[str]()
        if job.arch and first["arch"] != job.arch:
            fix = "start it again by its config, which locks its packages anew"
            raise ConfigError(f"host {self.hosts[0]}: {first['arch']}, the packages are for {job.arch}; {fix}")
        for host, facts in self._facts.items():
            if facts["system"] != "Linux":
                problems.append(f"host {host}: runs {facts['system']}, needs Linux")
            for key, what in (("arch", "architecture"), ("gpus", "GPUs and driver"), ("tpus", "TPU devices")):
                if facts[key] != first[key]:
                    has = f"{self.hosts[0]} has {first[key] or 'none'}"
                    problems.append(f"host {host}: {what} {facts[key] or 'none'}, {has}; take hosts that are alike")
        if problems:
            raise ConfigError(" | ".join(problems))
        if used := [f"host {host}: trains{facts['others']}" for host, facts in self._facts.items() if facts["others"]]:
            raise RunInUseError(f"{' | '.join(used)}; stop it with `runs stop`, or take other hosts")

    @override
    def ship(self, job: Job, attempts: Attempts) -> None:
        """Sends code and uv to the hosts that lack them, and installs Python and packages, all by content hash.

        Raises ConfigError, before anything is sent, with every host that has no space for it.
        """
        if job.packages != self._probed:
            self._probe(job)
        lacking = {what: [h for h in self.hosts if self._facts[h][what] == "no"] for what in ("bundle", "environment")}
        without = lacking["environment"]
        free = {host: int(self._facts[host]["free_kb"] or 0) / 2**20 for host in without}
        fix = f"{_NEEDED_GIB} are needed; free some, or name a folder on another disk with --workdir"
        if full := [f"host {host}: {gib:.1f} GiB free, {fix}" for host, gib in free.items() if gib < _NEEDED_GIB]:
            raise ConfigError(" | ".join(full))
        if lacking["bundle"]:
            bundle = attempts.kept("bundle", job.bundle)
            self._say(f"sending the code to {_names(lacking['bundle'])}")
            on_all(
                lacking["bundle"],
                lambda host: self.ssh.call(host, "unpack", job.bundle, stdin=bundle, timeout_s=_SEND_S),
            )
        if not without:
            return
        requirements = attempts.kept("requirements", job.packages)
        self._say(f"installing Python {job.python} and packages on {_names(without)}: minutes, once")
        installs = job.uv_variables | {k: v for k, v in job.secret_values().items() if k.startswith("UV_")}
        uv, variables = uv_for(job.arch), "\n".join(f"{k}={shlex.quote(v)}" for k, v in installs.items())

        def install(host: Host) -> None:
            if self._facts[host]["uv"] == "no":
                self.ssh.call(host, "receive", f"bin/uv-{uv_version()}", stdin=uv, timeout_s=_SEND_S)
            self.ssh.call(host, "receive", f"environments/{job.packages}/requirements.txt", stdin=requirements)
            arguments = (job.packages, uv_version(), job.python)
            self.ssh.call(host, "install", *arguments, stdin=variables.encode(), timeout_s=_SEND_S)

        on_all(without, install)

    def dry_start(self, job: Job) -> tuple[Sequence[str], str]:
        """Returns the words of the action that starts an attempt, and what runs on the hosts then."""
        action = ("start", job.id, "ATTEMPT", job.bundle, "PACKAGES", job.location)
        return action, f"# on each host: python {shlex.join(job.command)}"

    @override
    def start(self, job: Job, number: int, *, left_s: float = 0.0) -> None:
        secrets, several = job.secret_values(), len(self.hosts) > 1
        slices = len({host.slice for host in self.hosts})
        first = self.hosts[0].internal or self._facts[self.hosts[0]]["address"] if several else ""
        if several and not first:
            raise ConfigError(f"host {self.hosts[0]}: `hostname -I` says no address; install hostname, or give it one")
        split = split_location(job.location)
        run_dir = split[1] if split else job.location

        def begin(host: Host) -> None:
            rank, told = self.hosts.index(host), {RUN_DIR: run_dir}
            if several:
                told |= {
                    "JAX_COORDINATOR_ADDRESS": f"{_bracketed(first)}:{PORT}",
                    "JAX_NUM_PROCESSES": str(len(self.hosts)),
                    "JAX_PROCESS_ID": str(rank),
                }
            if slices > 1:  # libtpu's, for collectives between slices
                told |= {
                    "MEGASCALE_COORDINATOR_ADDRESS": first,
                    "MEGASCALE_NUM_SLICES": str(slices),
                    "MEGASCALE_SLICE_ID": str(host.slice),
                }
            what = HostJob(
                command=[*job.command],
                folder=job.folder,
                environment={**told, **job.environment, **secrets},
                run_dir=run_dir,
                attempt=number,
                is_first=rank == 0,
                left_s=left_s,
                deletion=[*self.source.deletion()] if rank == 0 else [],
            )
            content = json.dumps(asdict(what)).encode()
            arguments = (job.id, str(number), job.bundle, job.packages, job.location)
            self.ssh.call(host, "start", *arguments, stdin=content, timeout_s=120)

        on_all(self.hosts, begin)

    @override
    def watch(self, job: Job) -> Mapping[Host, HostState]:
        return on_all(self.hosts, partial(self._state, job.id))

    def _state(self, run: str, host: Host) -> HostState:
        try:
            output = self.ssh.call(host, "status", run, timeout_s=60) or b""
        except Unreachable:
            return HostState(attempt=0, state="away")
        attempt, state, code = output.decode().splitlines()[-1].split()
        return HostState(attempt=int(attempt), state=state, code=None if code == "-" else int(code))

    @override
    def console(self, job: Job, *, rank: int = 0, lines: str = "+1", follow: bool) -> subprocess.Popen[bytes]:
        arguments = (job.id, lines, "yes" if follow else "no")
        return self.ssh.stream(self.hosts[rank], "follow", *arguments, stdout=subprocess.PIPE)

    @override
    def ranks(self, job: Job) -> int:
        return len(self.hosts)

    @override
    def stop(self, job: Job, number: int, *, signal: str = "TERM") -> None:
        def end(host: Host) -> None:
            with suppress(Unreachable):  # what is away is not there to be stopped; a deadline may end it
                self.ssh.call(host, "stop", job.id, str(number), signal, timeout_s=60)

        on_all(self.hosts, end)

    def check_shared(self, path: str) -> None:
        """Raises ConfigError if the disk of a run directory is not the same on all hosts."""
        first, name = self.hosts[0], f"{path}/place/.seen-{time.time_ns()}"
        self.ssh.call(first, "create", name, stdin=b"seen")
        blind = [str(h) for h in self.hosts[1:] if self.ssh.call(h, "read", name, missing_ok=True) is None]
        if blind:
            fix = "use a folder that all hosts share (NFS, Lustre), or a bucket: root=gs://BUCKET/runs"
            raise ConfigError(f"root: {path} of host {first} is not there on {', '.join(blind)}; {fix}")


def code_of(states: Mapping[Host, HostState], *, is_elastic: bool = False) -> int | None:
    """Returns the exit code of a run whose hosts have all ended; None while one has not.

    That of a host that failed by itself comes before that of those that lost it, and a kill counts as a loss (76). An
    elastic run is done once one host is.
    """
    if is_elastic and any(each.code == 0 for each in states.values()):
        return 0
    if any(each.state in ("live", "away") for each in states.values()):
        return None
    codes = [PeerLostError.exit_code if each.code is None else each.code for each in states.values()]
    own = [code for code in codes if code not in (0, PeerLostError.exit_code)]
    return own[0] if own else max(codes)


def _names(hosts: Sequence[Host]) -> str:
    return f"{len(hosts)} hosts" if len(hosts) > 3 else ", ".join(map(str, hosts))


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
