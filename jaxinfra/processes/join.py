"""Joins the processes of a run, and makes the end of a user's script leave the others."""

import atexit
import logging
import os
import signal
import sys
from types import TracebackType

from jaxinfra.errors import ConfigError, JaxinfraError, PeerLostError
from jaxinfra.processes import cpu_collectives, ray_train
from jaxinfra.processes.connected_peers import SILENCE_S, ConnectedPeers
from jaxinfra.processes.discovery import Processes, find_processes
from jaxinfra.processes.door import SECRET, new_secret
from jaxinfra.processes.peer_connection import AGAIN, JOIN_S, free_port, is_loopback
from jaxinfra.processes.peers import Peers, current_peers, set_current_peers
from jaxinfra.processes.requests import RunSignals
from jaxinfra.storage.errors import cause_of
from jaxinfra.user_code import ending_of

# We say who is silent, by a clock that nobody sets. JAX measures silence by the time of day: when that is set forward,
# all processes seem silent, and it aborts them.
_JAX_HEARTBEAT_S = 10 * 365 * 24 * 3600
_END_S = 60.0  # for the other processes to end their scripts once one has

_log = logging.getLogger(__name__)


def join(
    processes: Processes | None = None,
    *,
    join_s: float = JOIN_S,
    silence_s: float = SILENCE_S,
    secret: str | None = None,
) -> Peers:
    """Connects the processes of a run, and their devices; they are `current_peers` from now on.

    Takes the place of `jax.distributed.initialize`, and must be called before anything asks JAX for its devices. If
    that was called already, as by Ray's JaxTrainer on GPUs and TPUs, the devices stay connected as they are. Raises
    PeerLostError and ConfigError as `ConnectedPeers`.

    The end of the script disconnects from the others, which get a minute to end theirs. Where the process goes on, as a
    worker of Ray does, use `with join():`.

    Args:
        processes: which processes there are; by default what the environment says (`find_processes`).
        join_s: longest wait for all to join.
        silence_s: silence after which a process counts as lost.
        secret: any text that only the processes of this start know; by default that of JAXINFRA_SECRET. Workers of Ray
            Train need none. Without one, whoever reaches the port of process 0 can take the place of a process.
    """
    alone = current_peers()
    if isinstance(alone, ConnectedPeers):
        if alone.has_left:
            raise ConfigError("join(): this process has left the others already; use one `with join():` around all")
        return alone
    if processes is None and (processes := find_processes(os.environ)) is None:
        return alone
    secret = _secret_of_start(processes, secret)
    peers = ConnectedPeers(processes, secret=secret, join_s=join_s, silence_s=silence_s)
    set_current_peers(peers)  # a signal must stop all of them from now on
    try:
        _connect_devices(peers, processes, join_s, silence_s)
    except BaseException as error:
        try:
            peers.leave(error)
        finally:
            set_current_peers(alone)
        raise
    leave_at_exit(peers)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        RunSignals(interrupts=False).__enter__()  # for the life of the process
    return peers


def _secret_of_start(processes: Processes, given: str | None) -> str:
    """Returns the secret that all processes of this start know; process 0 warns if there is none."""
    secret = os.environ.get(SECRET, "") if given is None else given
    if not secret and processes.source == ray_train.SOURCE:
        secret = ray_train.broadcast(new_secret())
    if not (secret or processes.index):
        _log.warning(
            "%s: whoever reaches this port can take the place of a process; set %s to the same random text in all "
            "processes, such as that of `openssl rand -hex 32`",
            *(processes.coordinator, SECRET),
        )
    return secret


def _connect_devices(peers: ConnectedPeers, processes: Processes, join_s: float, silence_s: float) -> None:
    import jax

    if jax.distributed.is_initialized():
        assert jax.process_index() == processes.index, "the scheduler has given JAX another index than ours"
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, and acts between steps only
    host = processes.coordinator.rpartition(":")[0]
    service = f"{host}:{peers.broadcast(free_port())}"
    try:
        jax.distributed.initialize(
            service,
            processes.count,
            processes.index,
            local_device_ids=processes.local_devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=service if is_loopback(host) else None,
            initialization_timeout=round(join_s),
            heartbeat_timeout_seconds=_JAX_HEARTBEAT_S,
            shutdown_timeout_seconds=round(2 * silence_s),
        )
    except jax.errors.JaxRuntimeError as error:
        peers.raise_cause_of(error)
        raise PeerLostError(
            f"{service}: JAX's service does not connect the processes: {cause_of(error)}; open the ports of {host} for "
            f"the other hosts, as JAX takes any free one, and {AGAIN}"
        ) from error
    cpu_collectives.use_address(cpu_collectives.reachable_address(peers.gather(peers.addresses), peers.index))


def leave_at_exit(peers: ConnectedPeers) -> None:
    """Makes a script leave the other processes when it ends, with the exit code of its error if it has one."""

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            peers.leave(error)
        except JaxinfraError as cause:
            error = cause
        code, line = ending_of(error)
        if isinstance(error, JaxinfraError):
            peers.exit(code, f"error: {line}")  # JAX would wait for the others
        try:
            show(kind, error, trace)
        finally:
            peers.exit(code)

    def leave() -> None:
        try:
            peers.leave(wait_s=_END_S)
        except JaxinfraError as error:
            peers.exit(error.exit_code, f"error: {error}")

    show, sys.excepthook = sys.excepthook, end
    atexit.register(leave)
