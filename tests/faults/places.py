"""Rows 49 and 50: places where a run is odd or short of something, and a launching machine that dies."""

import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.storage.atomic import write_bytes_atomic
from tests.cloud.packages import PackageServer
from tests.faults.config import LAST_STEP, READS, STEPS
from tests.faults.harness import Harness, NotTried, Run, named, require, until, wait
from tests.faults.machine import faketime_library, small_disk
from tests.faults.matrix import row
from tests.launchers.ssh_hosts import ssh_hosts

_ODD = "it's %20 #1 {y} $HOME & ö=ü"


@row(
    49,
    fault="a disk without inodes, a disk quota, a tight umask, an odd path, a clock that jumps by days ahead and back",
    must="82 or one line, which names the disk, and older checkpoints stay; no effect of the others; same bits",
)
def odd_places(harness: Harness) -> str:
    """Trains where files are scarce, then where names are odd, with a umask and a clock that are wrong."""
    return f"{_scarce(harness)}; {_odd(harness)}"


def _scarce(harness: Harness) -> str:
    """Runs out of inodes, then out of a quota, and goes on once there is more."""
    name = "inodes"
    with small_disk(256 << 20, inodes=150) as disk:
        if disk is None:
            raise NotTried("no disk can be mounted here; run as root")
        words, run = (f"root={disk}",), Run(name, str(disk / name), harness.run(name).reads)
        ended = harness.train(name, *words, "checkpoint.keep_last=100")
        require(ended.code == StorageError.exit_code, ended)
        named(ended.error, "No space left on device")
        steps = run.steps()
        require(steps, f"no checkpoint is left: {ended}")
        subprocess.run(["mount", "-o", "remount,nr_inodes=100000", str(disk)], check=True)
        ended = harness.train(name, *words, "checkpoint.keep_last=100", fail=f"save.write:0:{max(steps) + 20}:edquot")
        require(ended.code == 0, ended)
        named(ended.err, "saving failed", "quota exceeded", "the next save tries again")
        text = harness.same_bits(name, run=run)
        return f"82 without inodes after step {max(steps)}; a save without quota is named and left out; {text}"


def _odd(harness: Harness) -> str:
    """Trains in a folder with an odd name, with umask 077, while the clock jumps three days ahead and five back."""
    library, name = faketime_library(), "odd"
    if library is None:
        raise NotTried("libfaketime is missing; install the package faketime")
    root, clock = harness.folder / _ODD, harness.folder / "days.txt"
    run = Run(name, str(root / name), harness.run(name).reads)
    clock.write_text("+0")
    fake = {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_CACHE_DURATION": "1"}
    fake |= {"FAKETIME_TIMESTAMP_FILE": str(clock)}
    prefix, slow = ("sh", "-c", 'umask 077 && exec "$0" "$@"'), "step:0:*:sleep=0.1"
    with harness.started(name, f"root={root}", prefix=prefix, env=fake, fail=slow) as child:
        for steps, jump in ((12, "+3d"), (30, "-2d")):
            until(lambda steps=steps: len(run.losses()) > steps, child)
            write_bytes_atomic(clock, jump.encode())
        ended = wait(child)
    require(ended.code == 0, ended)
    refused = harness.train(name, f"root={harness.folder}/[1]*")
    require(refused.code == ConfigError.exit_code and "use another root" in refused.error, refused)
    opened = [path for path in Path(run.path).rglob("*") if path.stat().st_mode & 0o077]
    require(not opened, f"open to others: {opened[:3]}")
    harness.same_bits(name, run=run)
    return "no effect of umask, path and clock"


@row(
    50,
    fault="the machine that has started a run elsewhere dies, as a laptop without a battery",
    must="another takes over from the run directory; nothing is started twice; same bits",
)
def launching_machine(harness: Harness) -> str:
    """Kills what started a run by ssh; another one is refused a start, then goes on with it to its end."""
    if shutil.which("sshd", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None:
        raise NotTried("no sshd; install openssh-server")
    name, steps = "laptop", 0
    run = harness.run(name)
    folder, limit = harness.folder / "ssh", harness.folder / "last_step"
    folder.mkdir()
    write_bytes_atomic(limit, b"10")  # so that the run lasts until another machine has been refused
    with ExitStack() as stack:
        hosts = stack.enter_context(ssh_hosts(folder, ("a",)))
        packages = stack.enter_context(PackageServer("127.0.0.1")).environment
        env = {"JAXINFRA_SSH": hosts.ssh, "HOME": str(folder), **packages}
        place = ["--place=ssh", "--hosts=a", f"--workdir={folder}/workdir"]
        shared = {**packages, "UV_LINK_MODE": "symlink", LAST_STEP: str(limit), READS: str(run.reads)}
        shared |= harness.settings()
        place += [f"--env={key}={value}" for key, value in shared.items()]
        (harness.folder / ".gitignore").write_text("*\n!*.py\n")
        subprocess.run(["git", "init", "-q"], cwd=harness.folder, check=True)
        with harness.started(name, *place, env=env) as first:
            until(lambda: len(run.losses()) > 5, first)
        steps = len(run.losses())
        second = harness.launch(*harness.words(name, *place, "--devices=cpu:1"), env=env)
        require(second.code == 84, second)
        named(second.error, "is live on a")
        write_bytes_atomic(limit, str(STEPS).encode())
        ended = harness.launch("runs", "resume", f"a:{run.path}", env=env)
        require(ended.code == 0, ended)
    attempts = run.attempts()
    require(len(attempts) == 1, f"started {len(attempts)} times")
    return f"dead after step {steps}, one start in all; {harness.same_bits(name)}"
