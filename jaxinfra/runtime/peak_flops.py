"""The most that a device can compute, to measure what a run makes of it against."""

import time

import jax
import jax.numpy as jnp

from jaxinfra.parallel.mesh import Device

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets. The longest key that starts `device_kind`
# counts. v4 and v7x chips are given whole by Google; JAX lists v7x as two devices a chip, so half of 2307 TFLOP/s.
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
}


def peak_flops(device: Device, dtype: jnp.dtype, devices_here: int) -> tuple[float, str]:
    """Peak FLOP/s of one device, and where the figure is from.

    The figures of accelerators are bfloat16's. A CPU's is measured in `dtype`: emulated devices share the cores, so
    each of `devices_here`, those of this process, has its part of the whole.
    """
    if device.platform == "cpu":
        return measure_flops(device, dtype) / devices_here, f"measured, {jnp.dtype(dtype).name} matmul"
    if known := [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]:
        kind = max(known, key=len)
        return PEAK_FLOPS[kind], f"data sheet, bfloat16, {kind}"
    return measure_flops(device, dtype), f"measured, {jnp.dtype(dtype).name} matmul on {device.device_kind}"


def measure_flops(device: Device, dtype: jnp.dtype, size: int | None = None) -> float:
    """FLOP/s of the fastest of some square matrix products on one device."""
    size = size or (1024 if device.platform == "cpu" else 4096)  # a CPU is busy with 1024, in a tenth of the time
    with jax.default_device(device):
        a = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        times_s = []
        for _ in range(5):
            start_s = time.perf_counter()
            product(a, a).block_until_ready()
            times_s.append(time.perf_counter() - start_s)
    return 2 * size**3 / min(times_s)
