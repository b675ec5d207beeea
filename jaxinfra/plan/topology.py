"""Parses the `--on` of `python -m launch compile`, and asks the compiler for devices that are not attached.

`v5p:4x4x4` is a TPU slice, `2xv5e:2x4` two TPU slices joined by the data-center network, `h100:2x8` two hosts of eight
GPUs; `slice_sizes` has the cloud's names, such as `v5p-128`. No device is started.
"""

import importlib
import importlib.util
import math
import mmap
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxinfra.errors import ConfigError
from jaxinfra.machine.chips import CHIPS, Chip
from jaxinfra.packages import install_command
from jaxinfra.parallel.mesh import Device
from jaxinfra.plan.slice_sizes import COUNTED_PER_CHIP, SLICES, nearest_sizes
from jaxinfra.processes.signal_router import set_handlers

MAX_DEVICES = 65_536  # more than any slice has; devices are still laid out within seconds
INSTALL_COMMAND = install_command("jaxinfra[compile]")
_ENVIRONMENT = {  # by platform
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu queries a metadata server that only Google's machines have
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # silences a warning of libtpu; the topology is given separately
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at the same time
    },
    "cuda": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},  # no CUDA driver is needed to compile
}
# `v5p-128`, `2xv5e:2x4`, `h100`
_FORM = re.compile(
    r"(?:(?P<slices>[0-9]{1,5})x)?(?P<name>[a-z]\w*)(?::(?P<shape>[0-9]{1,5}(?:x[0-9]{1,5})*)|-(?P<size>[0-9]{1,9}))?"
)
_EXAMPLE_SHAPES = {("tpu", 2): "2x4", ("tpu", 3): "4x4x4", ("cuda", 2): "1x8"}  # by platform and number of dimensions
_COMPILERS = {  # by platform: a package, and the modules that must be importable
    "tpu": ("libtpu", ("libtpu",)),
    "cuda": ("jax-cuda13-plugin", ("jax_plugins", "jax_plugins.xla_cuda13")),
}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """TPU slices or GPU hosts."""

    chip: Chip
    shape: tuple[int, ...]  # chips of one slice in each dimension; for GPUs (hosts, GPUs per host)
    slices: int = 1

    def __str__(self) -> str:
        """Returns the text that `parse_topology` reads."""
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{slices}{self.chip.name}:{_join(self.shape)}"

    @property
    def num_devices(self) -> int:
        """Number of JAX devices."""
        return self.slices * math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Whether the chips of a TPU slice form rings, for each dimension x, y, z.

        A 3D slice has rings in all dimensions if it consists of whole 4 x 4 x 4 cubes. A 2D slice has rings in the
        dimensions with 16 chips. Source: Google Cloud's TPU documentation.
        """
        # The compiler must be told: without rings it turns every all-gather into an all-reduce.
        if self.chip.num_dims == 3:
            torus = all(size % 4 == 0 for size in self.shape)
            return (torus, torus, torus)
        x, y = (size == 16 for size in self.shape)
        return (x, y, False)


def parse_topology(text: str, chips: Mapping[str, Chip] = CHIPS) -> Topology:
    """Parses the value of `--on`; raises ConfigError if there is no such chip or slice."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise _wrong_form(text)
    name, slices = {"v5litepod": "v5e"}.get(match["name"], match["name"]), int(match["slices"] or 1)
    if name not in chips:
        raise ConfigError(f"--on {text}: unknown chip, must be one of {', '.join(chips)}; use --on v5p:4x4x4")
    chip = chips[name]
    shape = tuple(map(int, (match["shape"] or _default_shape(text, chip, match["size"])).split("x")))
    if len(shape) != chip.num_dims or 0 in shape or not slices:
        example = _EXAMPLE_SHAPES[chip.platform, chip.num_dims]
        raise ConfigError(f"--on {text}: {name} needs {chip.num_dims} positive sizes; use --on {name}:{example}")
    if chip.platform == "cuda" and slices > 1:
        raise ConfigError(f"--on {text}: GPUs have hosts, not slices; use --on {name}:{slices}x8")
    limit = chip.max_slice
    # A slice may be turned (8x16 is 16x8), so sizes are not compared by dimension.
    if limit is not None and (math.prod(shape) > math.prod(limit) or max(shape) > max(limit)):
        raise ConfigError(f"--on {text}: the largest slice of {name} is {_join(limit)}; use --on {name}:{_join(limit)}")
    topology = Topology(chip=chip, shape=shape, slices=slices)
    if limit is not None and chip.num_dims == 2 and _join(sorted(shape)) not in SLICES[name].values():
        raise ConfigError(f"--on {text}: the cloud has no such slice of {name}; use --on {_nearest(topology)}")
    if topology.num_devices > MAX_DEVICES:
        raise ConfigError(f"--on {text}: has {topology.num_devices:,} devices; use {MAX_DEVICES:,} or fewer")
    return topology


def _wrong_form(text: str) -> ConfigError:
    forms = "v5p-128, v5p:4x4x4, 2xv5e:2x4 (slices), h100 (a host of eight) or h100:2x8"
    return ConfigError(f"--on {text}: must be CHIP-SIZE or CHIP:SHAPE; use --on {forms}")


def _default_shape(text: str, chip: Chip, size: str | None) -> str:
    """Returns the shape of the cloud's slice of a size, or of one host of GPUs."""
    if size is None and chip.platform == "cuda":
        return "1x8"
    if size is None or chip.name not in SLICES:
        raise _wrong_form(text)
    if int(size) not in SLICES[chip.name]:
        prefix, unit = text.removesuffix(size), "TensorCores" if COUNTED_PER_CHIP[chip.name] > 1 else "chips"
        names = " or ".join(f"{prefix}{other}" for other in nearest_sizes(chip.name, int(size)))
        raise ConfigError(f"--on {text}: {chip.name} has no default slice of {size} {unit}; use --on {names}")
    return SLICES[chip.name][int(size)]


def _join(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _nearest(topology: Topology) -> str:
    """Returns one or two valid values of `--on` of about as many chips."""
    chip, prefix = topology.chip, str(topology).partition(":")[0]
    if chip.name not in SLICES:
        return f"{prefix}:{_EXAMPLE_SHAPES[chip.platform, chip.num_dims]}"
    sizes = nearest_sizes(chip.name, COUNTED_PER_CHIP[chip.name] * math.prod(topology.shape))
    return " or ".join(f"{prefix}:{SLICES[chip.name][size]}" for size in sizes)


def set_up_compiler(topology: Topology) -> None:
    """Makes JAX run on the CPU, and sets the environment variables that libtpu or the CUDA plugin reads when loaded.

    Call it before JAX lists any device. Raises ConfigError if the compiler is not installed.
    """
    if jax.config.jax_platforms != "cpu":
        jax.config.update("jax_platforms", "cpu")
    package, modules = _COMPILERS[topology.chip.platform]
    if not all(importlib.util.find_spec(module) for module in modules):
        raise ConfigError(f"--on {topology}: its compiler, {package}, is not installed; run {INSTALL_COMMAND}")
    for name, value in _ENVIRONMENT[topology.chip.platform].items():
        os.environ.setdefault(name, value)
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # set by JAX; passes of XLA would warn of limits of their own
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def topology_devices(topology: Topology) -> Sequence[Device]:
    """Returns devices that programs can be compiled for but not run on; call `set_up_compiler` first."""
    from jax.experimental import topologies

    sizes, on_sigterm = _join(topology.shape), signal.getsignal(signal.SIGTERM)
    try:
        if topology.chip.platform == "tpu":
            multislice_kwargs = {"num_slices": topology.slices} if topology.slices > 1 else {}
            name = f"{topology.chip.name}:{sizes}"
            description = topologies.get_topology_desc(name, platform="tpu", wrap=topology.wrap, **multislice_kwargs)
        else:
            target = _gpu_target_config(topology.chip)
            # JAX reads the topology of GPUs as slices x hosts x GPUs per host.
            description = topologies.get_topology_desc(platform="cuda", topology=f"1x{sizes}", target_config=target)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--on {topology}: the compiler does not know this slice: {reason}; use --on {_nearest(topology)}"
        ) from error
    set_handlers({signal.SIGTERM: on_sigterm})  # libtpu has set its own, which prints a crash dump
    assert len(description.devices) == topology.num_devices, (topology, len(description.devices))
    return description.devices


def slice_ids(topology: Topology, devices: Sequence[Device]) -> list[int]:
    """Returns the number of the TPU slice or GPU host of each device; links between two of them are slow."""
    if topology.chip.platform == "cuda":
        return [device.process_index for device in devices]
    return [device.slice_index if topology.slices > 1 else 0 for device in devices]


def _gpu_target_config(chip: Chip) -> str:
    """Reads the description of a GPU that is embedded in the CUDA plugin's shared library."""
    plugin = importlib.import_module("jax_plugins.xla_cuda13")
    library = Path(str(plugin.__file__)).with_name("xla_cuda_plugin.so")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        offset = content.find(f'device_description_str: "{chip.device_kind}"'.encode())
        if offset < 0:
            raise ConfigError(
                f"--on {chip.name}: {library.name} does not describe {chip.device_kind}; run {INSTALL_COMMAND}"
            )
        # The description is the null-terminated string around this offset.
        return content[content.rfind(b"\0", 0, offset) + 1 : content.find(b"\0", offset)].decode()
