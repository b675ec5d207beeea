"""Runs a job under Slurm: sbatch, squeue and scancel of a login node, which ssh reaches, or of this machine.

The login node and the nodes of the job share `workdir` and the run directory. The job's own script queues it again when
it was preempted, came to its time limit, or lost a node; so it goes on when the launching machine is gone.
"""

import shlex
import subprocess
from collections.abc import Mapping, Sequence

from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.place import Host, HostState
from jaxinfra.launchers.places.run_files import split_location
from jaxinfra.launchers.places.ssh import Unreachable
from jaxinfra.launchers.places.ssh_place import SshPlace

_RESTARTS = 20  # times that a job is queued again after a failure: it may fail at the same place
_SAVE_S = 300  # from Slurm's signal until the time limit of the job
# The login node replaces @BASE@ by `workdir`, and @RUN@ by the run's folder in it.
_SCRIPT = """\
#!/bin/sh
{options}
run="@RUN@"
python="@BASE@/environments/{packages}/bin/python"
export PYTHONPATH="@BASE@/bundles/{bundle}" JAXINFRA_RUN_DIR={run_dir}
export JAXINFRA_SECRET="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
cd "$PYTHONPATH"/{folder}
trap : TERM # a signal to all of the job; the tasks get it, too
rm -f "$run/done"
srun {srun} {task}
code=$?
[ ! -e "$run/done" ] || code=0
# Else Slurm is ending the job: one that was canceled, or that it queues again itself because it was preempted.
[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || exit "$code"
again() {{
    echo "[slurm] exit code $code: queued again"
    scontrol requeue "$SLURM_JOB_ID" && exit "$code"
}}
case $code in
75) [ -e "$run/stopped-{number}" ] || again ;;
76 | 77 | 82 | 134 | 137 | 143) [ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ] || again ;;
esac
"$python" -m jaxinfra.launchers.places.end_record "$JAXINFRA_RUN_DIR" {number} "$code"
echo "$code" >"$run/exit"
exit "$code"
"""
# srun returns the highest code of its tasks: that of a node that was lost, although the others have trained to the end.
_ELASTIC_TASK = 'trap : TERM; "$@"; code=$?; [ $code != 0 ] || : >"$0/done"; exit $code'


class SlurmPlace(SshPlace):
    """A run as one job of Slurm, with a process on each of its nodes. Its one host is the login node."""

    _told = ""

    @property
    def started(self) -> str:
        """Where a start runs, for people."""
        return f"is a job of Slurm, submitted on {self.hosts[0]}"

    def extras(self, job: Job) -> Sequence[str]:
        """Returns the extra for GPUs if the job asks for some: the login node need not have any."""
        return ("cuda",) * any("gpu" in option for option in job.place.sbatch)

    def script(self, job: Job, number: int | str) -> str:
        """Returns what sbatch gets, before the login node has filled in its own paths."""
        split, no_kill = split_location(job.location), ["--no-kill"] * job.is_elastic
        options = [f"--job-name={job.id}", f"--nodes={job.place.nodes}", "--ntasks-per-node=1"]
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
        )

    def start_action(self, job: Job) -> Sequence[str]:
        """Returns the words of the action that starts an attempt, for a dry run."""
        return ("submit", job.id, "ATTEMPT", job.location)

    def shown(self, job: Job) -> str:
        """Returns the job's script, for a dry run."""
        return f"# on the nodes of the job, by sbatch\n{self.script(job, 'ATTEMPT')}"

    def start(self, job: Job, number: int, *, left_s: float = 0.0) -> None:
        """Submits an attempt; nothing happens if it has been submitted. ConfigError with what sbatch says."""
        variables = {**job.environment, **job.secret_values()}
        content = {
            "script": self.script(job, number),
            **{f"variable_{name}": value for name, value in variables.items()},
        }
        told = "".join(f"{name}={shlex.quote(value)}\n" for name, value in content.items())
        arguments = (job.id, str(number), job.location)
        self.ssh.call(self.hosts[0], "submit", *arguments, stdin=told.encode(), timeout_s=120)

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

    def stop(self, job: Job, number: int, *, signal: str = "TERM") -> None:
        """Asks an attempt to save and leave, or cancels its job; one that waits in the queue leaves it."""
        self.ssh.call(self.hosts[0], "job-stop", job.id, str(number), signal, timeout_s=60)

    def console(self, job: Job, *, rank: int = 0, lines: str = "+1", follow: bool) -> subprocess.Popen[bytes]:
        """Starts to show what the tasks have printed, or one rank's own log; `follow` until the job ends."""
        split = split_location(job.location)
        log = f"{split[1] if split else job.location}/logs/rank-{rank}.log" if rank else ""
        arguments = (job.id, lines, "yes" if follow else "no", log)
        return self.ssh.stream(self.hosts[0], "job-follow", *arguments, stdout=subprocess.PIPE)

    def ranks(self, job: Job) -> int:
        """Returns the number of processes."""
        return job.place.nodes
