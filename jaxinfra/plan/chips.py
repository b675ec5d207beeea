"""Memory, peak compute and slice limits of the chips that `compile --on` accepts.

All numbers are per JAX device. A device is a whole chip, except on v4 and TPU7x: there it is half a chip.

TPU memory is from the system architecture pages of Google Cloud's TPU documentation, GPU memory from the device
descriptions in XLA's CUDA plugin, and peak FLOP/s from `machine.peak_flops`, which names its source.

Google publishes no TPU clock. It is computed as peak FLOP/s / (matrix units x 2 x rows x columns). The number of matrix
units was checked against the compiler's cycle estimate for the matmul of two 8192 x 8192 bfloat16 matrices: at this
clock the matmul runs at 0.70 (v6e) to 0.90 of peak FLOP/s.
"""

from dataclasses import dataclass
from typing import Literal

from jaxinfra.machine.peak_flops import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device of a TPU or GPU."""

    name: str  # in `--on`
    platform: Literal["tpu", "cuda"]
    device_kind: str  # JAX's `device_kind`, or a prefix of it
    num_dims: int  # sizes in `--on`; for GPUs 2 (hosts, GPUs per host)
    max_slice: tuple[int, ...] | None = None  # None for GPUs
    devices_per_chip: int = 1
    hbm_bytes: int
    peak_flops: float  # dense bfloat16 FLOP/s
    clock_hz: float | None = None  # of the matrix units; None for GPUs: their compiler estimates no cycles


def _tpu(
    name: str, device_kind: str, max_slice: tuple[int, ...], *, hbm_gib: int, flops: float, num_mxu: int, mxu_size: int
) -> Chip:
    return Chip(
        name=name,
        platform="tpu",
        device_kind=device_kind,
        num_dims=len(max_slice),
        max_slice=max_slice,
        devices_per_chip=2 if name in ("v4", "tpu7x") else 1,
        hbm_bytes=hbm_gib * GIB,
        peak_flops=flops,
        clock_hz=flops / (num_mxu * 2 * mxu_size**2),
    )


def _gpu(name: str, device_kind: str, hbm_bytes: int, flops: float) -> Chip:
    return Chip(name=name, platform="cuda", device_kind=device_kind, num_dims=2, hbm_bytes=hbm_bytes, peak_flops=flops)


CHIPS = {
    chip.name: chip
    for chip in (
        # A chip has two cores, each with 16 GiB, half of 275 TFLOP/s and 4 matrix units at 1.05 GHz.
        _tpu("v4", "TPU v4", (16, 16, 16), hbm_gib=16, flops=PEAK_FLOPS["TPU v4"] / 2, num_mxu=4, mxu_size=128),
        # One core of 4 matrix units at 1.50 GHz.
        _tpu("v5e", "TPU v5 lite", (16, 16), hbm_gib=16, flops=PEAK_FLOPS["TPU v5e"], num_mxu=4, mxu_size=128),
        # Two cores of 4 matrix units at 1.75 GHz; JAX lists them as one device.
        _tpu("v5p", "TPU v5", (16, 20, 28), hbm_gib=95, flops=PEAK_FLOPS["TPU v5p"], num_mxu=8, mxu_size=128),
        # The cycle estimate of a matmul is 1.4 times what two matrix units of this size could do, so there are more.
        _tpu("v6e", "TPU v6 lite", (16, 16), hbm_gib=32, flops=PEAK_FLOPS["TPU v6e"], num_mxu=4, mxu_size=256),
        # A chip has 192 GiB and 2307 TFLOP/s.
        _tpu("tpu7x", "TPU7x", (16, 24, 24), hbm_gib=96, flops=PEAK_FLOPS["TPU7x"], num_mxu=4, mxu_size=256),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 85_100_068_864, PEAK_FLOPS["NVIDIA A100"]),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, PEAK_FLOPS["NVIDIA H100"]),
        _gpu("h200", "NVIDIA H200 141GB HBM3e", 151_397_597_184, PEAK_FLOPS["NVIDIA H200"]),
        _gpu("b200", "NVIDIA B200", 191_514_411_008, PEAK_FLOPS["NVIDIA B200"]),
    )
}
