"""`python -m launch doctor [CONFIG]`: checks the hosts, disks and links of a run before its first step.

All processes look at their own host at the same time; process 0 compares what they find, and prints it.
"""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
from rich.table import Column
from rich.text import Text

import jaxinfra
from jaxinfra.checkpoint.disk_steps import folder_bytes
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.checkpoint.shards import StateShards
from jaxinfra.cli import config_argument
from jaxinfra.doctor import compare, host, speeds
from jaxinfra.doctor.findings import Finding, Level, exit_code, failed, merge
from jaxinfra.errors import JaxinfraError
from jaxinfra.machine.environment import code_digest, package_versions
from jaxinfra.machine.platforms import default_platform
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.processes.connected_peers import ConnectedPeers
from jaxinfra.processes.devices import all_devices
from jaxinfra.processes.peers import current_peers
from jaxinfra.storage import outputs
from jaxinfra.storage.checks import check_space
from jaxinfra.storage.connection import RETRY_ENV, require_server
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.location import is_remote
from jaxinfra.track.console import print_table, stdout_console, titled_table
from jaxinfra.track.formatting import format_bytes, format_step
from jaxinfra.train.job import Job
from jaxinfra.train.run_record import PACKAGES, equal_fields, user_code_digests
from jaxinfra.train.saving import folder_of_copies
from jaxinfra.train.trainer import Trainer

_RETRY_S = "10"  # seconds for which requests that fail are tried again: not as long as by a run
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run(options: argparse.Namespace) -> int:
    """Prints a row for each check; returns 0, or the exit code of those that have failed."""
    if options.prints:
        outputs.check_writable(options.json)
    os.environ.setdefault(RETRY_ENV, _RETRY_S)
    examination = _Examination(options)
    _say(options, "looking at hosts and links")
    examination.look_at_hosts()
    if not examination.has_failed("driver", "packages", "command"):  # else the devices may not connect
        _say(options, "looking at devices, and at what the run needs")
        examination.look_at_devices()
    if not examination.has_failed("bucket"):
        _say(options, f"writing and reading {examination.root}")
        examination.measure_storage()
    if options.prints:
        table = titled_table("", "check", "level", *(Column(each, overflow="fold") for each in ("found", "what to do")))
        for each in examination.findings:
            table.add_row(Text(each.check), Text(each.level, _STYLES[each.level]), Text(each.found), Text(each.fix))
        print_table(stdout_console(), table)
        outputs.write_json(options.json, {"checks": [each._asdict() for each in examination.findings]})
    return current_peers().broadcast(exit_code(examination.findings))


def _say(options: argparse.Namespace, what: str) -> None:
    if options.prints:
        print(f"doctor: {what}", file=sys.stderr, flush=True)


class _Examination:
    """Collects findings; all processes make the same calls, and have the same findings."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._peers, self.findings = options, current_peers(), list[Finding]()
        self._names = [self._peers.name_of(index) for index in range(self._peers.count)]
        self._loaded = None if options.config is None else config_argument.load_config(options)
        self.root = "." if self._loaded is None else self._loaded.run.root
        self._job: Job | None = None  # once the mesh fits

    def has_failed(self, *checks: str) -> bool:
        """Whether one of these checks has failed."""
        return any(each.check in checks and each.level == "fail" for each in self.findings)

    def look_at_hosts(self) -> None:
        """Checks what needs no devices."""
        kind, same = default_platform(), "install the same versions on all hosts"
        own = host.host_findings(self.root, kind)
        if not (self._options.devices or "").startswith("cpu") and (gpus := host.driver(kind)) is not None:
            own.append(gpus)
        if is_remote(self.root) and (away := _tried("bucket", lambda: require_server(self.root) or "")).level == "fail":
            left_out = "" if self._loaded is None else "; mesh, space and data are looked at once it answers"
            own.append(away._replace(fix=away.fix + left_out))  # each request would be tried again for long
        self._merge(own)
        versions = package_versions(PACKAGES)
        self._compare("Python", {"Python": platform.python_version()}, platform.python_version(), same, "warn")
        self._compare("packages", versions, ", ".join(f"{name} {version}" for name, version in versions.items()), same)
        if self._peers.count == 1:
            return
        digests = {"the code of jaxinfra": code_digest(Path(jaxinfra.__file__).parent)}
        if self._loaded is not None:
            self._compare("command", equal_fields(self._loaded.run), "the same", "start all with the same command")
            digests |= user_code_digests(self._loaded.run, self._peers)
        self._compare("code", digests, f"the same in {len(digests)} modules", "copy the same code to all hosts")
        offsets = compare.clock_offsets(self._peers)
        self.findings.append(compare.judge_clocks(offsets, self._names, signs=self.root.startswith("s3://")))
        if isinstance(self._peers, ConnectedPeers):
            self.findings.append(speeds.judge_links(speeds.link_speeds(self._peers), self._names))

    def look_at_devices(self) -> None:
        """Checks devices, mesh and collectives, and what the run needs of memory and disks."""
        devices, local = all_devices(), jax.local_devices()
        each = {"kind": local[0].device_kind, "number": len(local)}
        fix = "start all with the same --devices; look for a chip that is missing"
        self._compare("devices", each, f"{len(devices)} x {each['kind']}", fix)
        if self._loaded is None or self.has_failed("bucket"):
            return
        own = list[Finding]()
        try:
            hint = config_argument.prepare_command(self._options, self._loaded.run)
            self._job = Trainer(self._loaded, prepare_command=hint).job
            sizes = ", ".join(f"{axis} {size}" for axis, size in self._job.program.mesh.shape.items() if size > 1)
            own += [Finding("mesh", "ok", sizes or "one device"), *self._needs_of(self._job)]
        except JaxinfraError as error:
            own.append(failed("config", error))
        self._merge(own)
        if self._job is None or self.has_failed("config"):
            return
        try:
            self.findings += speeds.axis_findings(make_mesh(self._job.run.mesh, devices), self._peers.hosts)
        except jax.errors.JaxRuntimeError as error:
            fix = "open all ports of the hosts for each other; on GPUs NCCL_DEBUG=INFO says more"
            self.findings.append(Finding("collectives", "fail", cause_of(error), fix))

    def _needs_of(self, job: Job) -> Iterator[Finding]:
        """Yields whether memory and disks of this host suffice for the run."""
        config, peers, state = job.run.checkpoint, self._peers, job.program.saved
        with CheckpointManager(job.run_dir.checkpoints, config, read_only=True) as checkpoints:
            needed, fix = checkpoints.needed_bytes(state), "root=FOLDER on another disk"
        yield _tried("space", partial(_space, job.run_dir.location, needed, "saving checkpoints", fix))
        if config.local is not None:  # of all processes on this host, a copy and the next one
            shards, fix = StateShards(state, peers.hosts, peers.index), "checkpoint.local=FOLDER on another disk"
            sharing = range(peers.hosts.count(peers.hosts[peers.index]))
            there = (folder_bytes(folder_of_copies(config.local, job.run_dir.location, each)) for each in sharing)
            needed = max(0, 2 * shards.num_bytes * len(sharing) - sum(there))
            yield _tried("space of copies", partial(_space, config.local, needed, "keeping copies of the state", fix))
        yield _tried("batches and state", lambda: job.data.check_host_memory() or "enough memory")

    def measure_storage(self) -> None:
        """Writes and reads as the run does, in all processes at the same time."""
        measured, own = (math.nan, math.nan), list[Finding]()
        check, root = "bucket" if is_remote(self.root) else "disk", Path(self.root).absolute()
        try:
            if check == "bucket":
                measured = speeds.object_speeds(self.root)
            elif not self.has_failed("space"):
                measured = speeds.disk_speeds(next(path for path in (root, *root.parents) if path.is_dir()))
        except JaxinfraError as error:
            own.append(failed(check, error))
        if self._job is not None:
            own.append(_tried("data", partial(_read_batch, self._job)))
        found = self._peers.gather(measured)
        if not all(map(math.isnan, (written for written, _ in found))):
            self.findings.append(speeds.judge_storage(check, found, self._names))
        self._merge(own)

    def _merge(self, own: Iterable[Finding]) -> None:
        """Adds what each process has found on its own."""
        everywhere = self._peers.gather([*own])
        self.findings += merge([[Finding(*each) for each in found] for found in everywhere], self._peers.name_of)

    def _compare(self, check: str, own: Mapping[str, object], ok: str, fix: str, level: Level = "fail") -> None:
        """Adds what differs between the processes."""
        self.findings.append(compare.equal(check, self._peers.gather(own), self._names, level=level, ok=ok, fix=fix))


def _tried(check: str, test: Callable[[], str]) -> Finding:
    """Returns what a test says, or the error that it raises."""
    try:
        return Finding(check, "ok", test())
    except JaxinfraError as error:
        return failed(check, error)


def _space(folder: str, needed_bytes: int, purpose: str, fix: str) -> str:
    check_space(folder, needed_bytes, purpose=purpose, fix=f"use {fix}")
    return f"{format_bytes(needed_bytes)} needed for {purpose}"


def _read_batch(job: Job) -> str:
    """Reads the first batch of this process."""
    begin_s = time.monotonic()
    _, batch = job.data.training_batches(job.run.train, 0)[0]
    num_bytes = sum(array.nbytes for array in batch.values())
    return f"first batch, {format_bytes(num_bytes)}, in {format_step(time.monotonic() - begin_s)}"
