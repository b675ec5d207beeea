"""Chooses the address at which a process is reached in collectives of the CPU, which go through Gloo over TCP.

JAX leaves that to Gloo, which takes the address of the host's own name. In /etc/hosts of Debian and many others that is
a loopback address, which other hosts cannot reach, and in a container it may have none: then JAX does not start, on
GPUs neither. So this takes an address that is known to be reachable: that of the connection to process 0.
"""

import importlib
from collections.abc import Sequence

from jaxinfra.processes.peer_connection import is_loopback


def reachable_address(addresses: Sequence[tuple[str, str]], index: int) -> str:
    """Returns the address at which the other processes reach process `index`.

    Args:
        addresses: of the connection of each process to process 0, the address of the process and that of process 0.
        index: of this process.
    """
    own, _ = addresses[index]
    if not is_loopback(own):
        return own
    # It is on the host of process 0, which processes on other hosts, if there are any, reach at this address.
    return next((host_of_0 for other, host_of_0 in addresses if not is_loopback(other)), own)


def use_address(address: str) -> None:
    """Makes Gloo listen at this address; must be called after JAX's service has started, and before it has devices."""
    import jax
    from jax._src import distributed, xla_bridge
    from jax.extend.backend import register_backend_factory

    gloo = importlib.import_module("jaxlib._jax")  # has no types

    def make_client() -> object:
        if jax.config.jax_cpu_collectives_implementation != "gloo":
            return xla_bridge.make_cpu_client()
        client = distributed.global_state.client
        return xla_bridge.make_cpu_client(gloo.make_gloo_tcp_collectives(client, hostname=address))

    register_backend_factory("cpu", make_client, priority=0, fail_quietly=False)
