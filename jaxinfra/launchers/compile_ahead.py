"""Compiles the steps of an elastic run for fewer hosts while it trains, so that the next start finds them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from jaxinfra.launchers import tied_process
from jaxinfra.processes.door import SECRET, new_secret
from jaxinfra.processes.peer_connection import free_port

_LOOPBACK = "127.0.0.1"
_MOST_HOSTS = 8
"""As many processes have room on one host beside that which trains."""


class CompileAhead:
    """Processes on this host that stand for those of fewer hosts; they train nothing, and give way to those that do.

    Only where a program does not need the chips that train: on CPUs.

    Args:
        environment: variables to add to that of this process.
        say: shows a line to people.
    """

    def __init__(self, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._environment, self._say = environment, say
        self._running: list[subprocess.Popen[bytes]] = []
        self._begun_s: float | None = None

    def compile(self, hosts: int, command: Sequence[str], is_done: set[int]) -> None:
        """Compiles for a number of hosts, one after another; to be called again until that is done.

        What fails here is found again, and told, by a start that needs it.
        """
        if hosts in is_done or hosts > _MOST_HOSTS:
            return
        if self._begun_s is None:
            self._begun_s = time.monotonic()
            try:
                self._start(hosts, command)
            except OSError as error:
                self._say(f"warning: nothing is compiled ahead for fewer hosts: {error}")
                self.stop()
                is_done.add(hosts)
        elif self._running and all(each.poll() is not None for each in self._running):
            if all(each.returncode == 0 for each in self._running):
                of_hosts = f"{hosts} {'host' if hosts == 1 else 'hosts'}"
                self._say(f"elastic: compiled ahead for {of_hosts} in {time.monotonic() - self._begun_s:.0f} s")
            is_done.add(hosts)
            self._running = []

    def _start(self, hosts: int, command: Sequence[str]) -> None:
        coordinator, secret = f"{_LOOPBACK}:{free_port(_LOOPBACK)}", new_secret()
        tied = ["nice", "-n", "5", sys.executable, "-I", "-S", tied_process.__file__, str(os.getpid())]
        for process in range(hosts):
            several = {"JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(process), SECRET: secret}
            environment = {**os.environ, **self._environment, **several, "JAX_COORDINATOR_ADDRESS": coordinator}
            child = subprocess.Popen(
                [*tied, *command, "--compile-only"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            self._running.append(child)

    def stop(self) -> None:
        """Ends what is still compiled: the next start needs the processor."""
        for each in self._running:
            each.kill()
        for each in self._running:
            each.wait()
        self._running = []
