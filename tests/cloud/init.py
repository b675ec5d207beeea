"""The first process of a host: makes its file system, runs sshd, and ends with the process that booted it.

`hosts` starts it as a script, `python -I -S init.py`, and tells it by its input what to boot. Its parent stays outside,
in the namespaces of the tests, and waits for it. When the first process of a PID namespace ends, Linux kills all others
in it; its mounts and its network end with the last of them.
"""

import ctypes
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MS_MOVE, _MS_REC, _MS_PRIVATE, _MS_BIND = 0x2000, 0x4000, 0x40000, 0x1000  # linux/mount.h
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}
_NAMESPACES = os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWUTS | os.CLONE_NEWIPC
_SSHD_CONFIG = "HostKey /etc/ssh/ssh_host_ed25519_key\nPasswordAuthentication no\nMaxStartups 100\n"
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

_libc = ctypes.CDLL(None, use_errno=True)


def main(spec: dict[str, Any]) -> int:
    os.unshare(_NAMESPACES)
    first = os.fork()
    if first:
        _say(f"pid {first}")
        return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    socket.sethostname(spec["name"])
    _make_root(Path(spec["lower"]), Path(spec["scratch"]), Path(spec["shared"]), spec["firmware"])
    _say("ready")
    _serve(spec["owner"])
    return 0


def _serve(owner: int) -> None:
    """Runs sshd, and reaps what other processes leave, until `owner` (a pidfd) has ended."""
    run = {"env": _ENVIRONMENT, "stdin": subprocess.DEVNULL, "check": True}
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/etc/ssh/ssh_host_ed25519_key"], **run)
    Path("/etc/ssh/sshd_config.d/host.conf").write_text(_SSHD_CONFIG)
    Path("/run/sshd").mkdir()
    with open("/var/log/sshd.log", "ab") as log:
        subprocess.Popen(["/usr/sbin/sshd", "-D", "-e"], env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stderr=log)
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while not any(descriptor == owner for descriptor, _ in poll.poll(1000)):
        if select.select([wake], [], [], 0)[0]:
            os.read(wake, 4096)
        while _reap():
            pass


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:  # not even sshd is left
        return False


def _make_root(lower: Path, scratch: Path, shared: Path, firmware: dict[str, str]) -> None:
    """Makes `/` of a layer in memory upon `lower`, with `/shared` as the disk that all hosts mount."""
    _mount("none", Path("/"), flags=_MS_REC | _MS_PRIVATE)
    _mount("tmpfs", scratch, "tmpfs", data="mode=755")
    root = scratch / "root"
    for folder in (root, scratch / "upper", scratch / "work"):
        folder.mkdir()
    _mount("overlay", root, "overlay", data=f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work")
    _mount("proc", root / "proc", "proc")
    _mount("tmpfs", root / "run", "tmpfs", data="mode=755")
    _make_dev(root / "dev")
    _make_sys(root / "sys", root / "mnt", firmware)
    (root / "shared").mkdir()
    _mount(str(shared), root / "shared", flags=_MS_BIND)
    os.chdir(root)
    _mount(".", Path("/"), flags=_MS_MOVE)
    os.chroot(".")
    os.chdir("/")
    Path("/etc/resolv.conf").write_text("")  # else that of this machine, which no host reaches


def _make_dev(dev: Path) -> None:
    _mount("tmpfs", dev, "tmpfs", data="mode=755")
    os.umask(0)
    for name, (major, minor) in _DEVICES.items():
        os.mknod(dev / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    os.umask(0o022)
    for name, target in _LINKS.items():
        (dev / name).symlink_to(target)
    for name, kind, data in (("pts", "devpts", "newinstance,ptmxmode=666,mode=620,gid=5"), ("shm", "tmpfs", "")):
        (dev / name).mkdir()
        _mount(kind, dev / name, kind, data=data)


def _make_sys(sys_folder: Path, aside: Path, firmware: dict[str, str]) -> None:
    """Makes `/sys` as it is, but with the firmware of a cloud's machine: Linux may know none, or another."""
    _mount("sysfs", aside, "sysfs")
    _mount("tmpfs", sys_folder, "tmpfs", data="mode=755")
    (sys_folder / "class").mkdir()
    for source in (*aside.iterdir(), *(aside / "class").iterdir()):
        target = sys_folder / source.relative_to(aside)
        if source.is_dir() and source.name != "dmi" and not target.exists():
            target.mkdir()
            _mount(str(source), target, flags=_MS_BIND)
    folder = sys_folder / "class" / "dmi" / "id"
    folder.mkdir(parents=True)
    for name, value in firmware.items():
        (folder / name).write_text(f"{value}\n")
    _check(_libc.umount2(os.fsencode(aside), 0), f"umount {aside}")


def _mount(source: str, target: Path, kind: str | None = None, *, flags: int = 0, data: str = "") -> None:
    names = [os.fsencode(source), os.fsencode(target), kind.encode() if kind else None]
    _check(_libc.mount(*names, ctypes.c_ulong(flags), data.encode()), f"mount {source} {target}")


def _check(status: int, what: str) -> None:
    if status:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(json.load(sys.stdin)))
