"""CPU devices that stand in for others: the environment of a process that has so many of them."""

import os

THREADS = 4
"""Of XLA's pool for each device.

A device that waits in a collective holds a thread, and may wait in several at once. With hardly more threads than
devices, as by default, programs in which two collectives have no order (those of pipeline stages) can wait for ever.
"""

FLAGS = {
    # Scheduled for concurrency, such collectives start in another order on each device, whatever the number of threads.
    "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
    # XLA aborts when a device is 40 s late: those of a busy machine may be.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "600",
}


def emulation_env(devices: int) -> dict[str, str]:
    """Returns what JAX and XLA read when they start; flags that are set already stay."""
    flags = os.environ.get("XLA_FLAGS", "")
    more = (f"{name}={value}" for name, value in FLAGS.items() if name not in flags)
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "NPROC": str(THREADS * devices),
        "XLA_FLAGS": " ".join([flags, *more]).strip(),
    }
