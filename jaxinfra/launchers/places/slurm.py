"""Runs a job under Slurm: sbatch, squeue and scancel of a login node, which ssh reaches, or of this machine.

The login node and the nodes of the job share `workdir` and the run directory. The job's own script queues it again when
it was preempted, came to its time limit, or lost a node; so it goes on when the launching machine is gone.
"""

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import override

from jaxinfra.errors import ConfigError, PeerLostError
from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.place import Host, HostState, PlaceOptions
from jaxinfra.launchers.places.run_files import split_location
from jaxinfra.launchers.places.ssh import Unreachable
from jaxinfra.launchers.places.ssh_place import SshPlace
from jaxinfra.storage.location import is_remote

_RESTARTS = 20  # times in a row that a job is queued again after a failure, or before it could train
_LONG_S = 600  # an allocation that ended with a save, and lasted so long, counts as one with progress
_SAVE_S = 300  # from Slurm's signal until the time limit of the job
_GPUS = re.compile(r"--gpus|-G|--(gres|tres)[-a-z]*=.*gpu")
_GPUS_OF_NODE = re.compile(r"--(?:gpus-per-node=|gres=gpu:)(?:\w+:)?(\d+)")
# The login node replaces @BASE@ by `workdir`, and @RUN@ by the run's folder in it.
_SCRIPT = """\
#!/bin/sh
{options}
run="@RUN@"
python="@BASE@/environments/{packages}/bin/python"
export PYTHONPATH="@BASE@/bundles/{bundle}" JAXINFRA_RUN_DIR={run_dir}
export JAXINFRA_SECRET="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
cd "$PYTHONPATH"/{folder}
trap : TERM # a signal to all of the job; the tasks get it, too
rm -f "$run/done" "$run/saved"
began=$(date +%s)
code=75
[ -e "$run/stopped-{number}" ] || {{
    srun {srun} {task}
    code=$?
}}
[ ! -e "$run/saved" ] || code=75
[ ! -e "$run/done" ] || code=0
tries=0
until state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || [ $((tries += 1)) -ge 30 ]; do sleep 10; done
case $state in
RUNNING | "") ;;
*) exit "$code" ;; # Slurm is ending the job: it was canceled, or preempted, and then Slurm queues it again itself
esac
again() {{
    [ ! -e "$run/stopped-{number}" ] || return 0
    failures=$(($(cat "$run/failures" 2>/dev/null || echo 0) + 1))
    [ "$code" != 75 ] || [ $(($(date +%s) - began)) -lt {long} ] || failures=0
    echo "$failures" >"$run/failures"
    if [ "$failures" -gt {restarts} ]; then
        echo "[slurm] exit code $code: not queued again, {restarts} times in a row are enough; see --time and the log"
        return 0
    fi
    echo "[slurm] exit code $code: queued again"
    scontrol requeue "$SLURM_JOB_ID" && exit "$code"
}}
case $code in 75 | 76 | 77 | 82 | 134 | 137 | 143) again ;; esac
"$python" -m jaxinfra.launchers.places.end_record "$JAXINFRA_RUN_DIR" {number} "$code"
echo "$code" >"$run/exit"
exit "$code"
"""
# srun returns the highest code of its tasks: that of a node that was lost, although the others have trained to the end.
_ELASTIC_TASK = """\
trap : TERM
"$@"
code=$?
case $code in 0) : >"$0/done" ;; 75) : >"$0/saved" ;; esac
exit $code"""


def num_gpus(place: PlaceOptions) -> int:
    """Returns the GPUs of a job on all nodes, by its options of sbatch; 0 if they do not say it."""
    found = (_GPUS_OF_NODE.fullmatch(option) for option in place.sbatch)
    return place.nodes * next((int(each[1]) for each in found if each), 0)


class SlurmPlace(SshPlace):
    """A run as one job of Slurm, with a process on each of its nodes. Its one host is the login node."""

    poll_s = 5.0  # slurmctld is not to be asked often
    _told = ""

    @property
    @override
    def started(self) -> str:
        """Where a start runs, for people."""
        return f"is a job of Slurm, submitted on {self.hosts[0]}"

    @override
    def extras(self, job: Job) -> Sequence[str]:
        """Returns the extra for GPUs if the job asks for some: the login node need not have any."""
        return ("cuda",) * any(_GPUS.match(option) for option in job.place.sbatch)

    @override
    def _check(self, job: Job) -> None:
        """Raises PeerLostError if Slurm does not answer the login node, ConfigError if it has no Slurm."""
        super()._check(job)
        host = self.hosts[0]
        if said := self._facts[host]["slurm"]:
            kind = ConfigError if said.endswith(": not found") else PeerLostError
            fix = "start it on a login node, or name one by --hosts USER@LOGIN"
            raise kind(f"host {host}: Slurm does not answer: {said}; {fix}")

    def script(self, job: Job, number: int | str) -> str:
        """Returns what sbatch gets, before the login node has filled in its own paths."""
        split, no_kill = split_location(job.location), ["--no-kill"] * job.is_elastic
        options = [f"--job-name={job.id}-{number}", f"--nodes={job.place.nodes}", "--ntasks-per-node=1"]
        options += [f"--output=@RUN@/console-{number}.log", "--open-mode=append", "--requeue"]
        options += [f"--signal=TERM@{_SAVE_S}", *no_kill, *job.place.sbatch]
        task = f'"$python" {shlex.join(job.command)}'
        return _SCRIPT.format(
            options="\n".join(f"#SBATCH {option}" for option in options),
            packages=job.packages or "PACKAGES",
            bundle=job.bundle,
            run_dir=shlex.quote(split[1] if split else job.location),
            folder=shlex.quote(job.folder),
            srun=shlex.join([*no_kill, "--kill-on-bad-exit=0", "--wait=0"]),
            task=f'sh -c {shlex.quote(_ELASTIC_TASK)} "$run" {task}' if job.is_elastic else task,
            number=number,
            restarts=_RESTARTS,
            long=_LONG_S,
        )

    def dry_start(self, job: Job) -> tuple[Sequence[str], str]:
        """Returns the words of the action that starts an attempt, and the job's script."""
        command = "# on the login node: sbatch --parsable @RUN@/job-ATTEMPT.sh, which runs on the nodes of the job:"
        return ("submit", job.id, "ATTEMPT", job.location), f"{command}\n{self.script(job, 'ATTEMPT')}"

    @override
    def start(self, job: Job, number: int, *, left_s: float = 0.0) -> None:
        """Submits an attempt; nothing happens if it has been submitted. ConfigError with what sbatch says."""
        variables = {**job.environment, **job.secret_values()}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        told = f"script={shlex.quote(self.script(job, number))}\nexports={shlex.quote(exports)}\n"
        arguments = (job.id, str(number), job.location)
        self.ssh.call(self.hosts[0], "submit", *arguments, stdin=told.encode(), timeout_s=120)

    @override
    def watch(self, job: Job) -> Mapping[Host, HostState]:
        """Returns the state of the job; says when it changes, such as why it waits in the queue."""
        if not self.hosts:
            return {}
        host = self.hosts[0]
        try:
            output = self.ssh.call(host, "job-status", job.id, timeout_s=60) or b""
        except Unreachable:
            return {host: HostState(attempt=0, state="away")}
        said, state = output.decode().splitlines()[-2:]
        if said != self._told:
            self._told = said
            self._say(said)
        attempt, name, code = state.split()
        return {host: HostState(attempt=int(attempt), state=name, code=None if code == "-" else int(code))}

    @override
    def stop(self, job: Job, number: int, *, signal: str = "TERM") -> None:
        """Asks an attempt to save and leave, or cancels its job; one that waits in the queue leaves it."""
        self.ssh.call(self.hosts[0], "job-stop", job.id, str(number), signal, timeout_s=60)

    @override
    def console(self, job: Job, *, rank: int = 0, lines: str = "+1", follow: bool) -> subprocess.Popen[bytes]:
        """Starts to show what the tasks have printed, or one rank's own log; `follow` until the job ends."""
        split = split_location(job.location)
        log = f"{split[1] if split else job.location}/logs/rank-{rank}.log" if rank else ""
        arguments = (job.id, lines, "yes" if follow and not is_remote(log) else "no", log)
        return self.ssh.stream(self.hosts[0], "job-follow", *arguments, stdout=subprocess.PIPE)

    @override
    def ranks(self, job: Job) -> int:
        """Returns the number of processes."""
        return job.place.nodes
