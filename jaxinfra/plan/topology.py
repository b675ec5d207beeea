"""Hardware that is described and not here: what `--on` names, and the devices that a compiler makes of it.

`v5p:4x4x4` is a slice of TPUs, `2xv5e:2x4` two slices that meet over the data-centre network, `h100:2x8` two hosts of
eight GPUs. Nothing here starts a device; `prepare` sets what libtpu and the CUDA plugin read when they are loaded.
"""

import importlib
import importlib.util
import math
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh import Device
from jaxinfra.plan.chips import CHIPS, Chip

EXAMPLE = "use --on v5p:4x4x4, --on 2xv5e:2x4 (two slices) or --on h100:1x8 (hosts x GPUs)"
MOST_DEVICES = 65_536
"""More than anyone has, and as many as can be laid out in seconds."""

INSTALL = "pip install -e '.[compile]'"
_ENVIRONMENT = {
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks a metadata server, which only Google's machines have
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # silences it, whatever topology is then asked for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    },
    "cuda": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},  # of a driver that is not here
}
_COMPILERS = {
    "tpu": ("libtpu", ("libtpu",)),
    "cuda": ("jax-cuda13-plugin", ("jax_plugins", "jax_plugins.xla_cuda13")),
}
"""Packages, and the modules that show that they are installed."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices by description.

    Attributes:
        chip: of which kind.
        shape: chips of one slice along each dimension of its network; of GPUs hosts and GPUs a host.
        slices: how many slices of TPUs.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        """As in `--on`."""
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        """Number of JAX devices."""
        return self.slices * math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Along which dimensions the links of a TPU slice close to a ring.

        Three-dimensional slices do where they are made of whole cubes of 4 x 4 x 4, two-dimensional ones along 16
        chips (Google Cloud's TPU documentation). It matters: without rings the compiler makes an all-reduce of every
        all-gather.
        """
        if self.chip.dimensions == 3:
            torus = all(size % 4 == 0 for size in self.shape)
            return (torus, torus, torus)
        x, y = (size == 16 for size in self.shape)
        return (x, y, False)


def parse(text: str) -> Topology:
    """Reads what `--on` names; a ConfigError where there is no such chip or shape."""
    matched = re.fullmatch(r"(?:([0-9]{1,5})x)?([a-z]\w*):([0-9]{1,5}(?:x[0-9]{1,5})*)", text)
    if matched is None:
        raise ConfigError(f"--on {text}: expected a chip and a shape; {EXAMPLE}")
    slices, name, shape = int(matched[1] or 1), matched[2], tuple(map(int, matched[3].split("x")))
    if name not in CHIPS:
        raise ConfigError(f"--on {text}: no such chip; known are {', '.join(CHIPS)}; {EXAMPLE}")
    chip = CHIPS[name]
    if len(shape) != chip.dimensions or 0 in shape or not slices:
        raise ConfigError(f"--on {text}: {name} wants {chip.dimensions} sizes above 0; use --on {_example(chip)}")
    if chip.platform == "cuda" and slices > 1:
        raise ConfigError(f"--on {text}: GPUs come in hosts, not in slices; use --on {name}:{slices}x8")
    if chip.largest is not None and (math.prod(shape) > math.prod(chip.largest) or max(shape) > max(chip.largest)):
        largest = "x".join(map(str, chip.largest))
        raise ConfigError(f"--on {text}: a slice of {name} has at most {largest} chips; use --on {name}:{largest}")
    found = Topology(chip=chip, shape=shape, slices=slices)
    if found.count > MOST_DEVICES:
        raise ConfigError(f"--on {text}: {found.count:,} devices; use {MOST_DEVICES:,} or fewer")
    return found


def _example(chip: Chip) -> str:
    """A topology of a chip that there is."""
    return f"{chip.name}:{'1x8' if chip.platform == 'cuda' else {2: '2x4', 3: '4x4x4'}[chip.dimensions]}"


def prepare(topology: Topology) -> None:
    """Makes ready to compile without devices, before JAX is asked for one; ConfigError without the compiler."""
    if jax.config.jax_platforms != "cpu":
        jax.config.update("jax_platforms", "cpu")
    package, modules = _COMPILERS[topology.chip.platform]
    if not all(importlib.util.find_spec(module) for module in modules):
        raise ConfigError(f"--on {topology}: the compiler for it, {package}, is not installed; use {INSTALL}")
    for name, value in _ENVIRONMENT[topology.chip.platform].items():
        os.environ.setdefault(name, value)


def devices(topology: Topology) -> Sequence[Device]:
    """The described devices, to compile for, not to run on; ConfigError for unknown ones. `prepare` comes first."""
    from jax.experimental import topologies

    sizes = "x".join(map(str, topology.shape))
    try:
        if topology.chip.platform == "tpu":
            slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
            name = f"{topology.chip.name}:{sizes}"
            described = topologies.get_topology_desc(name, platform="tpu", wrap=topology.wrap, **slices)
        else:
            target = _gpu_target(topology.chip)
            described = topologies.get_topology_desc(platform="cuda", topology=f"1x{sizes}", target_config=target)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--on {topology}: the compiler knows no such slice: {' '.join(str(error).split())}; use --on "
            f"{_example(topology.chip)}"
        ) from error
    assert len(described.devices) == topology.count, (topology, len(described.devices))
    return described.devices


def domains(topology: Topology, placed: Sequence[Device]) -> list[int]:
    """Of each device the slice, or of a GPU the host: inside it links are fast."""
    if topology.chip.platform == "cuda":
        return [device.process_index for device in placed]
    return [device.slice_index if topology.slices > 1 else 0 for device in placed]


def _gpu_target(chip: Chip) -> str:
    """The description of a GPU that the CUDA plugin carries in its shared object; a ConfigError where it has none."""
    plugin = importlib.import_module("jax_plugins.xla_cuda13")
    library = Path(str(plugin.__file__)).with_name("xla_cuda_plugin.so")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(f'device_description_str: "{chip.kind}"'.encode())
        if at < 0:
            raise ConfigError(f"--on {chip.name}: {library.name} has no description of {chip.kind}; use {INSTALL}")
        return content[content.rfind(b"\0", 0, at) + 1 : content.find(b"\0", at)].decode()
