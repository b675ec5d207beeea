"""CPU devices that stand in for others: the environment of a process that has so many of them."""

THREADS = 4
"""Of XLA's pool for each device.

A device that waits in a collective holds a thread, and may wait in several at once. With hardly more threads than
devices, as by default, programs in which two collectives have no order (those of pipeline stages) can wait for ever.
"""


def environment(devices: int) -> dict[str, str]:
    """What JAX and XLA read when they start."""
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": str(THREADS * devices)}
