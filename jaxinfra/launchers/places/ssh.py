"""Runs the actions of `host.sh` on hosts through the user's own ssh, on many at once, or on this machine.

Keys, known hosts, jump hosts and the agent are those that the user's OpenSSH has. `JAXINFRA_SSH` replaces the command,
such as `ssh -F /path/to/config`.
"""

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from jaxinfra.errors import ConfigError, PeerLostError
from jaxinfra.launchers.places.place import Host

_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=15")
_ALIVE = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
_THREADS = 64  # connections at once
_UNREACHABLE = 255  # ssh's own exit code
MARK = b"--- jaxinfra\n"
"""Comes before what an action prints, and after what a host greets with."""
MISSING = 3
"""Exit code of `read` and `create` of host.sh, for what is not there, or there already."""


class Unreachable(PeerLostError):
    """A host does not answer ssh."""


@dataclass(frozen=True, kw_only=True)
class Ssh:
    """Connections to the hosts of a place."""

    workdir: str = ""  # on the hosts
    options: Sequence[str] = ()  # of ssh, such as -i KEY
    known_hosts: Path | None = None  # the file of keys of hosts, whose folder the first call makes; None is ssh's own

    def command(self, host: Host, action: str, *arguments: str, length: int = 0, script: str = "") -> list[str]:
        """Returns the command line of an action; a dry run shows it with a name in place of the script."""
        words = ["sh", "-c", script or _script(), "host", self.workdir, str(length)]
        words += [action, *arguments]
        if not host.address:
            return words
        alias = ["-o", f"HostKeyAlias={host.key_name}"] if host.key_name else []
        program = shlex.split(os.environ.get("JAXINFRA_SSH", "ssh"))
        known = ["-o", f"UserKnownHostsFile={self.known_hosts}"] if self.known_hosts else []
        return [*program, *_OPTIONS, *_ALIVE, *self.options, *known, *alias, "--", host.address, shlex.join(words)]

    def call(
        self,
        host: Host,
        action: str,
        *arguments: str,
        stdin: bytes | Path = b"",
        missing_ok: bool = False,
        timeout_s: float = 300.0,
    ) -> bytes | None:
        """Runs an action on a host and returns its output; None if it says that something is missing.

        Raises Unreachable, or ConfigError with the last line of what the host said.
        """
        length = stdin.stat().st_size if isinstance(stdin, Path) else len(stdin)
        command = self.command(host, action, *arguments, length=length)
        if self.known_hosts is not None:
            self.known_hosts.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(stdin, Path):
                with stdin.open("rb") as file:
                    done = subprocess.run(command, stdin=file, capture_output=True, check=False, timeout=timeout_s)
            else:
                done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=timeout_s)
        except FileNotFoundError:
            raise ConfigError(f"{command[0]}: not installed; install OpenSSH's client") from None
        except subprocess.TimeoutExpired:
            raise Unreachable(f"host {host}: no answer within {timeout_s:.0f} s; check the host") from None
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        if done.returncode == _UNREACHABLE and host.address:
            reason = said[-1] if said else "no answer"
            raise Unreachable(f"host {host}: ssh cannot reach it: {reason}; see that `ssh {host.address} true` works")
        if done.returncode == MISSING and missing_ok:
            return None
        if done.returncode:
            raise ConfigError(f"host {host}: {action} failed: {' '.join(said[-3:]) or f'exit code {done.returncode}'}")
        _, mark, output = done.stdout.partition(MARK)
        if not mark:
            raise ConfigError(f"host {host}: {action} has no answer; see that `ssh {host.address} sh -c true` works")
        return output

    def stream(self, host: Host, action: str, *arguments: str, stdout: IO[bytes] | int) -> subprocess.Popen[bytes]:
        """Starts an action whose output goes on, such as `follow`."""
        command = self.command(host, action, *arguments)
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL)


def after_mark(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yields the lines of an action, without what the host greets with."""
    assert process.stdout is not None
    is_greeting = True
    for line in process.stdout:
        if not is_greeting:
            yield line.decode(errors="replace")
        is_greeting = is_greeting and line != MARK


def on_all[T](hosts: Sequence[Host], do: Callable[[Host], T]) -> Mapping[Host, T]:
    """Calls `do` for each host, many at once; raises one error that names every host where it failed."""
    results: dict[Host, T] = {}
    errors: list[ConfigError | PeerLostError] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for host, future in [(host, pool.submit(do, host)) for host in hosts]:
            try:
                results[host] = future.result()
            except (ConfigError, PeerLostError) as error:
                errors.append(error)
    if errors:
        raise type(errors[0])(" | ".join(map(str, errors)))
    return results


@cache
def _script() -> str:
    lines = Path(__file__).with_name("host.sh").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))
