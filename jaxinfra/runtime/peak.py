"""The most that a device can compute, to measure what a run makes of it against."""

import time

import jax
import jax.numpy as jnp

from jaxinfra.parallel.mesh import Device

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets. Keys are the start of `device_kind`.
# v4 and v7x chips are given whole by Google; JAX lists v7x as two devices a chip, so half of 2307 TFLOP/s.
CHIP_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v7": 1153.5e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: Device, dtype: jnp.dtype, devices_here: int) -> tuple[float, str]:
    """Peak FLOP/s of one device, and where the figure is from.

    A CPU's is measured: emulated devices share the cores, so each has its part of the whole.

    Args:
        device: one device of the mesh.
        dtype: what a CPU is measured in; the figures of accelerators are bfloat16's.
        devices_here: devices of this process.
    """
    if device.platform == "cpu":
        return measured_flops(device, dtype) / devices_here, f"measured, {jnp.dtype(dtype).name} matmul"
    for kind, flops in CHIP_FLOPS.items():
        if device.device_kind.startswith(kind):
            return flops, f"data sheet, bfloat16, {kind}"
    return measured_flops(device, dtype), f"measured, {jnp.dtype(dtype).name} matmul on {device.device_kind}"


def measured_flops(device: Device, dtype: jnp.dtype, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some square matrix products on one device."""
    with jax.default_device(device):
        a = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        times_s = []
        for _ in range(repeats):
            start_s = time.perf_counter()
            product(a, a).block_until_ready()
            times_s.append(time.perf_counter() - start_s)
    return 2 * size**3 / min(times_s)
