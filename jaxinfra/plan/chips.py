"""The accelerators that a run can be compiled for without having them: what one JAX device of each is.

A device is a chip, but of v4 and TPU7x, whose chips are described as two devices: their figures are halves. Sources:
of TPUs the system architecture pages of Google Cloud's TPU documentation (HBM capacity and bandwidth of a chip), of
GPUs the device descriptions in XLA's CUDA plugin. Peak FLOP/s are those of `runtime.peak`, which names its source.

The clock of a TPU is worked out: peak FLOP/s / (matrix units x 2 x rows x columns). The number of units was checked
against the compiler's own estimate for a product of two 8192 x 8192 bfloat16 matrices, which comes to 0.70 (v6e) to
0.90 of that many operations a cycle.
"""

from dataclasses import dataclass
from typing import Literal

from jaxinfra.runtime.peak import CHIP_FLOPS

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of a kind.

    Attributes:
        name: as in `--on`.
        platform: which compiler knows it.
        kind: JAX's `device_kind`, or what it starts with.
        dimensions: of the network that joins the chips of a slice; of a GPU hosts and GPUs.
        largest: slice that there is; None of GPUs.
        devices_per_chip: how many devices JAX lists for a chip.
        hbm_bytes: memory of one device.
        hbm_bytes_per_s: what it can read or write.
        flops: dense bfloat16 FLOP/s of one device.
        clock_hz: of the units that the compiler counts cycles of; None where it counts none.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    kind: str
    dimensions: int
    largest: tuple[int, ...] | None = None
    devices_per_chip: int = 1
    hbm_bytes: int
    hbm_bytes_per_s: float
    flops: float
    clock_hz: float | None = None


def _tpu(
    name: str, kind: str, largest: tuple[int, ...], *, gib: float, gb_per_s: float, flops: float, units: int, side: int
) -> Chip:
    return Chip(
        name=name,
        platform="tpu",
        kind=kind,
        dimensions=len(largest),
        largest=largest,
        devices_per_chip=2 if name in ("v4", "tpu7x") else 1,
        hbm_bytes=int(gib * GIB),
        hbm_bytes_per_s=gb_per_s * 1e9,
        flops=flops,
        clock_hz=flops / (units * 2 * side * side),
    )


def _gpu(name: str, kind: str, hbm_bytes: int, gb_per_s: float, flops: float) -> Chip:
    memory = {"hbm_bytes": hbm_bytes, "hbm_bytes_per_s": gb_per_s * 1e9}
    return Chip(name=name, platform="cuda", kind=kind, dimensions=2, flops=flops, **memory)


CHIPS = {
    chip.name: chip
    for chip in (
        # 32 GiB, 1228 GB/s and 275 TFLOP/s a chip of two cores, 4 matrix units of 128 x 128 a core: 1.05 GHz.
        _tpu("v4", "TPU v4", (16, 16, 16), gib=16, gb_per_s=614, flops=CHIP_FLOPS["TPU v4"] / 2, units=4, side=128),
        # 16 GiB, 819 GB/s, one core of 4 units: 1.50 GHz.
        _tpu("v5e", "TPU v5 lite", (16, 16), gib=16, gb_per_s=819, flops=CHIP_FLOPS["TPU v5e"], units=4, side=128),
        # 95 GiB, 2765 GB/s, two cores of 4 units, one device: 1.75 GHz.
        _tpu("v5p", "TPU v5", (16, 20, 28), gib=95, gb_per_s=2765, flops=CHIP_FLOPS["TPU v5p"], units=8, side=128),
        # 32 GiB, 1640 GB/s; units of 256 x 256. The estimate of a product is 1.4 times what two could do.
        _tpu("v6e", "TPU v6 lite", (16, 16), gib=32, gb_per_s=1640, flops=CHIP_FLOPS["TPU v6e"], units=4, side=256),
        # 192 GiB, 7380 GB/s and 2307 TFLOP/s a chip of two devices.
        _tpu("tpu7x", "TPU7x", (16, 24, 24), gib=96, gb_per_s=3690, flops=CHIP_FLOPS["TPU7x"], units=4, side=256),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2039, CHIP_FLOPS["NVIDIA A100"]),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3352, CHIP_FLOPS["NVIDIA H100"]),
        _gpu("h200", "NVIDIA H200 141GB HBM3e", 151_397_597_184, 4800, CHIP_FLOPS["NVIDIA H200"]),
        _gpu("b200", "NVIDIA B200", 191_514_411_008, 7672, CHIP_FLOPS["NVIDIA B200"]),
    )
}
