"""Named sets of compiler options, the values of `train.compiler`.

Options change with compiler versions, so runs name a set, and a test compiles every set with the real compilers. A set
changes the schedule of operations, not their results. docs/performance.md has measurements, also of options that did
not help.
"""

from collections.abc import Mapping
from typing import Literal

from jaxinfra.errors import ConfigError

type Options = dict[str, str | int | bool]
type OptionSet = Literal["default", "large_blocks", "overlap"]

OPTION_SETS: Mapping[OptionSet, Mapping[str, Options]] = {
    # Each set has an entry for every platform that it is for. These are the compiler's own defaults.
    "default": {"gpu": {}, "tpu": {}},
    # An operation may use 64 MiB of vector memory for its blocks, four times the default: large matmuls get closer to
    # the peak FLOPS, and take longer to compile.
    "large_blocks": {"tpu": {"xla_tpu_scoped_vmem_limit_kib": 64 * 1024}},
    # Overlaps collectives with computation. On GPUs loops over layers are unrolled by two, so that the weights of a
    # layer are gathered during the computation of the one before. On TPUs the sparse cores gather and sum, while the
    # matrix units compute, and blocks are larger yet than those of `large_blocks`, which v6e gains from.
    "overlap": {
        "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_while_loop_double_buffering": True},
        "tpu": {
            "xla_tpu_scoped_vmem_limit_kib": 96 * 1024,
            "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
            "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,  # along two dimensions of the torus
            "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
        },
    },
}


def compiler_options(name: OptionSet, platform: str) -> Options:
    """Returns the options of a set on "cpu", "gpu" or "tpu"; raises ConfigError if the platform does not have it."""
    if platform == "cpu":  # CPUs emulate other hardware, and accept every set
        return {}
    by_platform = OPTION_SETS[name]
    if platform not in by_platform:
        available = [other for other, platforms in OPTION_SETS.items() if platform in platforms]
        raise ConfigError(
            f"train.compiler={name}: only for {' and '.join(by_platform)}, not for {platform}; "
            f"use train.compiler={available[-1]}"  # "default" only if no other set is for the platform
        )
    return dict(by_platform[platform])
