"""Runs on a host: starts the supervised run, keeps the deadline, and leaves how it ended. Imports no JAX.

`host.sh start` starts it in a session of its own, so that it lives when the launching machine is gone. It reads the
job, which may hold secrets, from its standard input. It ends with the run; nothing stays on the host but files. Where
the place was made for the run, the first host then deletes it, by its own service account, if nobody has by then.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxinfra.errors import JaxinfraError, PeerLostError
from jaxinfra.launchers import tied_process
from jaxinfra.launchers.places.end_record import record_end
from jaxinfra.processes.maintenance import get

RUN_DIR = "JAXINFRA_RUN_DIR"
"""Tells the supervisor the run directory, which else takes loading the config, and seconds."""
GRACE_S = 600.0
"""Time from the end of a run that may be started again until the host deletes the place, if nobody starts it."""
DONE_S = 30.0
"""The same for a run that is done: the launching machine, if it is there, is faster."""
SAVE_S = 600.0
"""Time from the deadline until the run, which was asked to save, is killed."""
_POLL_S = 0.5
_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class HostJob:
    """What one host is to run, as it gets it on its standard input."""

    command: list[str]  # words after the Python
    folder: str  # below the bundle, where the command was typed
    environment: dict[str, str]
    run_dir: str  # path or URL
    attempt: int
    is_first: bool  # whether this host tells the run directory how the attempt has ended
    left_s: float = 0.0  # seconds until the deadline; 0 is none
    # The URLs that delete the place; none on all hosts but one, and where nothing was made.
    deletion: list[str] = field(default_factory=list)


def main(folder: Path, length: int) -> int:
    """Runs the job and returns the exit code of the run."""
    alive = (folder / "alive").open("a")
    fcntl.flock(alive, fcntl.LOCK_EX)
    (folder / "pid").write_text(str(os.getpid()))
    told = sys.stdin.buffer.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if len(told) != length:
        _say("error: the job was cut off on its way; the launching machine starts it again")
        return PeerLostError.exit_code
    job, code, is_over = HostJob(**json.loads(told)), JaxinfraError.exit_code, False
    try:
        code, is_over = run_job(job)
    finally:
        if job.is_first:
            os.environ.update(job.environment)  # credentials
            _say(record_end(job.run_dir, job.attempt, code, is_over=is_over))
        (folder / "exit.new").write_text(f"{code}\n")
        (folder / "exit.new").replace(folder / "exit")
        alive.close()
        _delete(folder, job, 0.0 if is_over else GRACE_S if code else DONE_S)
    return code


def run_job(job: HostJob) -> tuple[int, bool]:
    """Runs the job, and returns its exit code, and whether the deadline has ended it; SIGTERM goes to the run."""
    tied = ["-I", "-S", tied_process.__file__, str(os.getpid()), sys.executable]
    environment, deadline_s = {**os.environ, **job.environment}, time.monotonic() + job.left_s
    child = subprocess.Popen([sys.executable, *tied, *job.command], cwd=Path.cwd() / job.folder, env=environment)
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    asked_at_s: float | None = None
    while (code := child.poll()) is None:
        if job.left_s and asked_at_s is None and time.monotonic() >= deadline_s:
            asked_at_s = time.monotonic()
            _say("the deadline of --max-hours: the run saves and leaves")
            child.terminate()
        if asked_at_s is not None and time.monotonic() - asked_at_s > SAVE_S:
            _say(f"not gone {SAVE_S:.0f} s after the deadline: killed")
            child.kill()
        time.sleep(_POLL_S)
    return code if code >= 0 else PeerLostError.exit_code, asked_at_s is not None


def _delete(folder: Path, job: HostJob, grace_s: float) -> None:
    """Deletes the place in a while, unless another attempt has started, or somebody looks at this host to start one."""
    if not job.deletion:
        return
    _say(f"the run has ended; this place is deleted in {grace_s:.0f} s, if it still is there")
    ended_s, looked = time.time(), folder / "looked"
    while time.time() < (max(ended_s, looked.stat().st_mtime) if looked.exists() and grace_s else ended_s) + grace_s:
        time.sleep(1.0)
    if (folder / "attempt").read_text().strip() == str(job.attempt):  # else another start trains here
        for url in job.deletion:
            delete_place(url, job.run_dir)


def delete_place(url: str, run: str, environment: Mapping[str, str] = os.environ) -> None:
    """Sends the request that deletes the place, with the token of this host's service account."""
    metadata = environment.get("GCE_METADATA_HOST", "metadata.google.internal")
    token_url = f"http://{metadata}/computeMetadata/v1/instance/service-accounts/default/token"
    reason = ""
    for left in reversed(range(_TRIES)):
        try:
            token: dict[str, Any] = json.loads(get(token_url, {"Metadata-Flavor": "Google"}) or "{}")
            headers = {"Authorization": f"Bearer {token.get('access_token', '')}"}
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="DELETE"), timeout=60):
                _say(f"asked for the deletion of {url}")
                return
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    _say(f"{url} is gone already")
                    return
                reason = f"{error.code} {error.reason}"
        except (OSError, ValueError) as error:
            reason = str(error)
        if left:
            _say(f"{url} was not deleted: {reason}; trying again")
            time.sleep(10.0)
    fix = f"run `jaxinfra runs stop {run}`, and give the service account of the hosts the right to delete"
    _say(f"error: {url} was NOT deleted and goes on costing: {reason}; {fix}")


def _say(text: str) -> None:
    print(f"[host] {time.strftime('%F %T')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
