"""What hosts have outside of their namespaces: a folder and network links, swept when their process is dead."""

import json
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

STATE = Path("/run/jaxinfra-tests")
"""A folder for each process that has hosts."""

PREFIX = "jx"  # of all links; then the name of the folder

LOCK = "hosts"


def new_folder() -> Path:
    """Makes the folder of this process, under LOCK, after it has swept those of dead ones."""
    STATE.mkdir(parents=True, exist_ok=True)
    sweep()
    folder = STATE / secrets.token_hex(3)
    folder.mkdir()
    record(folder / "owner", os.getpid())
    return folder


def record(path: Path, pid: int) -> None:
    """Writes which process it is."""
    path.write_text(f"{pid} {_started(pid)}\n")


def sweep() -> list[str]:
    """Removes what dead processes have left, under LOCK; returns the names of their folders."""
    folders = [folder for folder in sorted(STATE.glob("*")) if not _alive(folder / "owner")]
    for folder in folders:
        remove(folder)
    return [folder.name for folder in folders]


def remove(folder: Path) -> None:
    """Ends the hosts of a folder, and removes their links and the folder."""
    for file in folder.glob("*.pid"):
        if pid := _alive(file):
            os.kill(pid, signal.SIGKILL)
    for link in links(folder.name):
        delete_link(link)
    shutil.rmtree(folder)


def links(folder: str = "") -> list[str]:
    """Returns the links of a folder, or of all."""
    done = subprocess.run(["ip", "-j", "link", "show"], check=True, capture_output=True, text=True)
    return [link["ifname"] for link in json.loads(done.stdout) if link["ifname"].startswith(PREFIX + folder)]


def delete_link(link: str) -> None:
    """Removes a link; Linux may remove it at the same time, with the network of a host that has ended."""
    done = subprocess.run(["ip", "link", "delete", link], capture_output=True, text=True)
    if done.returncode and link in links():
        raise RuntimeError(f"ip link delete {link}: {done.stderr.strip()}")


def ip(*commands: str, namespace: int | None = None) -> None:
    """Runs commands of iproute2, all in one process, in the network of process `namespace`."""
    inside = [] if namespace is None else ["nsenter", f"--net=/proc/{namespace}/ns/net"]
    command = [*inside, "ip", "-batch", "-"]
    done = subprocess.run(command, input="\n".join(commands), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip: {'; '.join(commands)}: {done.stderr.strip()}")


def _alive(file: Path) -> int | None:
    """Returns the process that a file names, None if it has ended, whoever has its number by now."""
    if not file.exists():
        return None
    pid, started = file.read_text().split()
    return int(pid) if _started(int(pid)) == started else None


def _started(pid: int) -> str:
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "ended"
    return "ended" if state in "ZX" else fields[18]
