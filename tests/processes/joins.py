"""A program for schedulers to start: prints as JSON what `find_processes` finds, as each process sees it.

With `--join`, the processes also join and add up an array that is sharded over all their devices. With `--detect`,
processes other than 0 leave the detection of coordinator, count and index to JAX: they only meet process 0 if JAX finds
the same.
"""

import dataclasses
import json
import os
import sys

from jaxinfra.processes.discovery import Processes, find_processes


def main() -> None:
    found = find_processes(os.environ)
    assert found is not None and "jax" not in sys.modules
    result = dataclasses.asdict(found)
    if "--join" in sys.argv:
        result |= _join(found, detect="--detect" in sys.argv and found.index > 0)
    sys.stdout.write(json.dumps(result) + "\n")


def _join(found: Processes, *, detect: bool) -> dict[str, int]:
    """Returns the sum of 0 ... devices - 1, this process's index, and the devices in all and of this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    if detect:
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            local_device_ids=found.local_devices,
            coordinator_bind_address=found.coordinator,  # else it listens on all interfaces
            cluster_detection_method="deactivate",
        )
    mesh, size = jax.make_mesh((jax.device_count(),), ("x",)), jax.device_count()
    sharded, replicated = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    numbers = jax.make_array_from_callback((size,), sharded, lambda index: np.arange(size)[index])
    total = jax.jit(jnp.sum, out_shardings=replicated)(numbers)
    result = {"sum": int(total), "joined_as": jax.process_index(), "devices": size, "local": jax.local_device_count()}
    jax.distributed.shutdown()
    return result


if __name__ == "__main__":
    main()
