"""Finds the peak FLOP/s of a device, for MFU (model FLOPs utilization)."""

import time

import jax
import jax.numpy as jnp

from jaxinfra.machine.measured import cpu_name, keep_measured, read_measured
from jaxinfra.parallel.mesh import Device

# Dense bfloat16 FLOP/s of one JAX device by the start of its `device_kind`, from the vendors' data sheets. The longest
# start counts. Google publishes FLOP/s per chip; JAX lists a v7x chip as two devices, so half of 2307 TFLOP/s.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v7": 1153.5e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GB300": 2500e12,
}

_HIGHER = 1.05  # times the kept peak: less is noise


def peak_flops(device: Device, dtype: jnp.dtype, num_local_devices: int) -> tuple[float, str]:
    """Returns the peak FLOP/s of one device, and the source of that number.

    For accelerators of `PEAK_FLOPS` it is the bfloat16 peak. For others it is measured in `dtype`. On CPU the emulated
    devices share the cores, so the peak of the CPU is divided by their number.
    """
    measured = f"estimated from a {jnp.dtype(dtype).name} matmul"
    if device.platform == "cpu":
        return measure_cpu_peak(device, dtype) / num_local_devices, f"{measured}, the fastest on this CPU so far"
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    if kinds:
        kind = max(kinds, key=len)
        return PEAK_FLOPS[kind], f"data sheet, bfloat16, {kind}"
    return measure_flops(device, dtype), f"{measured} on {device.device_kind}"


def kept_cpu_peak(dtype: jnp.dtype) -> float | None:
    """Returns the highest FLOP/s that was measured on this CPU; None if none was."""
    return read_measured(_peak_name(dtype))


def measure_cpu_peak(device: Device, dtype: jnp.dtype) -> float:
    """Measures the peak FLOP/s of the CPU, and returns the kept one unless this one is clearly higher.

    Other work on the machine only lowers what is measured. So the MFU of the same work stays the same.
    """
    kept, measured = kept_cpu_peak(dtype), measure_flops(device, dtype)
    if kept is not None and measured < _HIGHER * kept:
        return kept
    keep_measured(_peak_name(dtype), measured)
    return measured


def _peak_name(dtype: jnp.dtype) -> str:
    return f"FLOP/s, {cpu_name()}, {jnp.dtype(dtype).name}"


def measure_flops(device: Device, dtype: jnp.dtype, size: int | None = None) -> float:
    """Measures the FLOP/s of one device: the fastest of five matmuls of square matrices."""
    size = size or (1024 if device.platform == "cpu" else 4096)  # 1024 is enough for a CPU, and ten times faster
    with jax.default_device(device):
        a = jnp.ones((size, size), dtype)
        matmul = jax.jit(jnp.matmul)
        matmul(a, a).block_until_ready()
        times_s = []
        for _ in range(5):
            start_s = time.perf_counter()
            matmul(a, a).block_until_ready()
            times_s.append(time.perf_counter() - start_s)
    return 2 * size**3 / min(times_s)
