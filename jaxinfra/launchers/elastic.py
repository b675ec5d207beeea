"""Starts of a run that goes on with the hosts that are there: `--supervise --elastic MIN..MAX`. Imports no JAX."""

import hmac
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

from jaxinfra.errors import Preempted, StorageError
from jaxinfra.launchers.compile_ahead import CompileAhead
from jaxinfra.launchers.rendezvous import Rendezvous, RoundWatch
from jaxinfra.launchers.rounds import Bounds, Host, Round
from jaxinfra.launchers.supervisor import Start, Watch
from jaxinfra.machine.platforms import default_platform
from jaxinfra.processes.discovery import Processes
from jaxinfra.processes.door import SECRET
from jaxinfra.processes.peer_connection import free_port, is_loopback
from jaxinfra.processes.step_file import ROUND

type Say = Callable[[str], None]


class ElasticStarts:
    """Meets the other hosts before each start.

    Args:
        location: path or URL of the run.
        processes: one a host, as many as there may be; this one among them.
        bounds: how many hosts there may be.
        command: of the process of this host.
        environment: variables to add to its environment.
        say: shows a line to people.
    """

    def __init__(
        self,
        location: str,
        processes: Processes,
        bounds: Bounds,
        command: Sequence[str],
        environment: Mapping[str, str],
        say: Say,
    ) -> None:
        self._host = this_host(processes)
        self._rendezvous, self._bounds = Rendezvous(location, self._host, bounds), bounds
        self._command, self._environment, self._say = command, {**environment}, say
        self._compiled = set[int]()  # numbers of hosts
        if processes.local_devices is not None:
            self._environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, processes.local_devices))

    def next_start(self, is_stopped: Callable[[], bool]) -> Start | int:
        """Waits for a round that this host trains in."""
        decided = self._rendezvous.meet(is_stopped=is_stopped, say=lambda line: self._say(f"elastic: {line}"))
        if decided is None:
            return Preempted.exit_code
        if decided.code is not None:
            self._say(f"elastic: the run has ended on the other hosts with exit code {decided.code}")
            return decided.code
        process = decided.indices.index(self._host.index)
        if process == 0:
            self._say(f"elastic: {decided}")
        secret = self._environment.get(SECRET) or os.environ.get(SECRET, "")
        environment = {
            "JAX_COORDINATOR_ADDRESS": decided.hosts[0].address,
            "JAX_NUM_PROCESSES": str(len(decided.hosts)),
            "JAX_PROCESS_ID": str(process),
            ROUND: str(decided.number),
            # A process that is late, of an earlier round, does not get in.
            SECRET: hmac.new(secret.encode(), str(decided.number).encode(), "sha256").hexdigest(),
        }
        if "MEGASCALE_NUM_SLICES" in self._environment:  # of libtpu
            environment |= {
                "MEGASCALE_NUM_SLICES": str(len(decided.hosts) // self._bounds.together),
                "MEGASCALE_SLICE_ID": str(process // self._bounds.together),
                "MEGASCALE_COORDINATOR_ADDRESS": decided.hosts[0].address.rpartition(":")[0],
            }
        return Start(
            command=self._command_for(decided.overrides),
            environments=[{**self._environment, **environment}],
            first_rank=process,
            hosts=asdict(decided),
            watch=self._watch(decided, process),
        )

    def _command_for(self, overrides: Sequence[str]) -> Sequence[str]:
        """Returns the command of a process, with other values of some fields."""
        replaced = {word.partition("=")[0] for word in overrides}
        return [*(word for word in self._command if word.partition("=")[0].strip() not in replaced), *overrides]

    @contextmanager
    def _watch(self, decided: Round, process: int) -> Iterator[Watch]:
        """Watches a round; once it trains, the host of process 0 compiles for as many hosts as there may be next."""
        fewer = [hosts for hosts in self._bounds.overrides if self._bounds.least <= hosts < len(decided.hosts)]
        ahead = CompileAhead(self._environment, self._say)

        def compile_ahead() -> None:
            if process == 0 and fewer and default_platform() == "cpu":  # others have no devices but those that train
                hosts = max(fewer)
                ahead.compile(hosts, self._command_for(self._bounds.overrides[hosts]), is_done=self._compiled)

        try:
            with RoundWatch(self._rendezvous, compile_ahead) as watch:
                yield watch
        finally:
            ahead.stop()

    def end(self, code: int, *, only_here: bool) -> None:
        """Tells the other hosts that this one leaves, or that the run has ended."""
        with suppress(StorageError):  # then they find out after a while
            if only_here:
                self._rendezvous.leave()
            else:
                self._rendezvous.end(code)


def this_host(processes: Processes) -> Host:
    """Returns this host, with an address at which the others reach it."""
    host, _, port = processes.coordinator.rpartition(":")
    if processes.index == 0:
        address = processes.coordinator
    elif is_loopback(host):  # all are on one machine
        address = f"{host}:{free_port(host)}"
    else:
        own = processes.hosts[processes.index] if processes.hosts else _address_towards(host.strip("[]"), int(port))
        address = f"[{own}]:{port}" if ":" in own else f"{own}:{port}"
    return Host(index=processes.index, name=socket.gethostname(), address=address)


def _address_towards(host: str, port: int) -> str:
    """Returns the address of this machine in the network of another one; sends nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    except OSError:  # its name has gone with it
        return socket.gethostname()
    with socket.socket(family, kind, protocol) as channel:
        channel.connect(address)
        return channel.getsockname()[0]
