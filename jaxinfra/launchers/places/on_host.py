"""Runs on a host: starts the supervised run, keeps the deadline, and leaves how it ended. Imports no JAX.

`host.sh start` starts it in a session of its own, so that it lives when the launching machine is gone. It reads the
job, which may hold secrets, and deletes the file. It ends with the run; nothing stays on the host but files. Where the
place was made for the run, the first host then deletes it, by its own service account, if nobody has by then.
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
    """What one host is to run, as `job.json` has it."""

    command: list[str]  # words after the Python
    folder: str  # below the bundle, where the command was typed
    environment: dict[str, str]
    deadline: float = 0.0  # seconds since the epoch; 0 is none
    # The URLs that delete the place; none on all hosts but one, and where nothing was made.
    deletion: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the deadline is over."""
        return bool(self.deadline) and time.time() >= self.deadline


def main(folder: Path) -> int:
    """Runs the job of a folder and returns the exit code of the run."""
    alive = (folder / "alive").open("a")
    fcntl.flock(alive, fcntl.LOCK_EX)
    (folder / "pid").write_text(str(os.getpid()))
    attempt = (folder / "attempt").read_text()
    job = HostJob(**json.loads((folder / "job.json").read_text()))
    (folder / "job.json").unlink()
    code = _run(job)
    (folder / "exit.new").write_text(f"{code}\n")
    (folder / "exit.new").replace(folder / "exit")
    alive.close()
    if job.deletion:
        grace_s = 0.0 if job.is_over else GRACE_S if code else DONE_S
        _say(f"the run has ended; this place is deleted in {grace_s:.0f} s, if it still is there")
        time.sleep(grace_s)
        if (folder / "attempt").read_text() == attempt:  # else another start trains here
            for url in job.deletion:
                delete_place(url)
    return code


def _run(job: HostJob) -> int:
    """Starts the run and waits for its end; SIGTERM goes to it, and so does the deadline."""
    child = subprocess.Popen(
        [sys.executable, *job.command], cwd=Path.cwd() / job.folder, env={**os.environ, **job.environment}
    )
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    asked_at_s: float | None = None
    while (code := child.poll()) is None:
        if job.is_over and asked_at_s is None:
            asked_at_s = time.monotonic()
            _say("the deadline of --max-hours: the run saves and leaves")
            child.terminate()
        if asked_at_s is not None and time.monotonic() - asked_at_s > SAVE_S:
            _say(f"not gone {SAVE_S:.0f} s after the deadline: killed")
            child.kill()
        time.sleep(_POLL_S)
    return code if code >= 0 else 128 - code


def delete_place(url: str, environment: Mapping[str, str] = os.environ) -> None:
    """Sends the request that deletes the place, with the token of this host's service account."""
    metadata = environment.get("GCE_METADATA_HOST", "metadata.google.internal")
    token_url = f"http://{metadata}/computeMetadata/v1/instance/service-accounts/default/token"
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
    _say(f"error: {url} was NOT deleted and goes on costing; give the service account the right, or delete it by hand")


def _say(text: str) -> None:
    print(f"[host] {time.strftime('%F %T')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
