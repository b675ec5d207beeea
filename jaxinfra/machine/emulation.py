"""Emulates several accelerators with CPU devices: environment variables that JAX and XLA read when they start."""

import os

# A device that waits in a collective holds a thread of XLA's pool, and may wait in several at once. XLA's default is
# hardly more threads than devices: collectives without a fixed order, such as those of pipeline stages, can deadlock.
THREADS_PER_DEVICE = 4

FLAGS = {
    # This scheduler may start such collectives in another order on each device: also a deadlock.
    "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
    # By default XLA aborts if a device is 40 s late, which happens on a busy machine.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "600",
}


def emulation_env(num_devices: int) -> dict[str, str]:
    """Returns the environment variables of a process with this many CPU devices; XLA flags already set are kept.

    A single device waits for no other. It keeps XLA's own pool and scheduler: with more threads than cores, or with
    the operations in order, small steps take a fifth longer.
    """
    found = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    if num_devices == 1:
        return found
    flags = os.environ.get("XLA_FLAGS", "")
    added = (f"{name}={value}" for name, value in FLAGS.items() if name not in flags)
    # NPROC is the size of XLA's thread pool.
    return found | {
        "NPROC": str(THREADS_PER_DEVICE * num_devices),
        "XLA_FLAGS": " ".join([flags, *added]).strip(),
    }
