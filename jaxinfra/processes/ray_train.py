"""Asks Ray Train which of its workers this process is: Ray sets no environment variables for that.

A worker has Ray loaded before it calls the training function, so that Ray is never imported here. `on_worker` and
`address` take the environment of the process, which they ignore, as the functions of `schedulers`.
"""

import sys
from typing import Any

from jaxinfra.errors import PeerLostError
from jaxinfra.processes.peer_connection import AGAIN, JOIN_S, free_port
from jaxinfra.processes.schedulers import Environment
from jaxinfra.storage.background import in_thread

SOURCE = "Ray Train"
"""How messages name it."""


def on_worker(environment: Environment) -> bool:
    """Returns whether this is a process in which Ray Train calls a training function."""
    try:
        return sys.modules.get("ray.train") is not None and context().get_world_size() > 0
    except RuntimeError:  # Ray Train is imported, but this is no worker
        return False


def context() -> Any:
    """Returns what Ray Train says of this worker, such as its rank."""
    return sys.modules["ray.train"].get_context()


def address(environment: Environment) -> str:
    """Returns HOST:PORT of worker 0, which chooses a free port; all workers must call it."""
    import ray.util

    port, host = free_port(), ray.util.get_node_ip_address()
    return broadcast(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def broadcast(own: str) -> str:
    """Returns the text of worker 0; all workers must call it."""
    import ray.train.collective

    # Ray waits without a limit, unless its controller was started with RAY_TRAIN_COLLECTIVE_TIMEOUT_S.
    found = in_thread(lambda: ray.train.collective.broadcast_from_rank_zero(own), "ray-broadcast", daemon=True)
    try:
        return found.result(JOIN_S)
    except TimeoutError:
        cause = f"another one has not called join() within {JOIN_S:.0f} s"
        raise PeerLostError(f"worker {context().get_world_rank()} of Ray Train: {cause}; {AGAIN}") from None
