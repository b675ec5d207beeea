"""Named sets of compiler options: what `train.compiler` stands for on each platform.

Options belong to one compiler and go with its versions: runs name a set, never an option, and a test has the real
compilers take every set. A set changes where and when work is done, not what is computed. What each was found to be
worth, and what was tried and left out, is in docs/performance.md.
"""

from collections.abc import Mapping
from typing import Literal

from jaxinfra.errors import ConfigError

type Options = dict[str, str | int | bool]
type OptionSet = Literal["default", "large_blocks", "overlap"]

SETS: Mapping[OptionSet, Mapping[str, Options]] = {
    # What the compiler does by itself.
    "default": {"gpu": {}, "tpu": {}},
    # An operation may take 64 MiB of a chip's vector memory for its blocks, four times as much as by itself: large
    # products run closer to the peak of the matrix units, and are compiled for longer.
    "large_blocks": {"tpu": {"xla_tpu_scoped_vmem_limit_kib": 64 * 1024}},
    # Collectives start early and are waited for late; loops over layers are unrolled by two, so that the weights of a
    # layer are gathered while the one before it computes.
    "overlap": {
        "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_while_loop_double_buffering": True}
    },
}


def options(name: OptionSet, platform: str) -> Options:
    """The options of a set on a platform ("cpu", "gpu" or "tpu"); a ConfigError where it has none.

    CPUs stand in for other hardware, and take every set as nothing.
    """
    if platform == "cpu":
        return {}
    by_platform = SETS[name]
    if platform not in by_platform:
        there = [other for other, platforms in SETS.items() if platform in platforms]
        raise ConfigError(
            f"train.compiler={name}: is for {' and '.join(by_platform)}, not for {platform}; "
            f"use train.compiler={there[-1]}"
        )
    return dict(by_platform[platform])
