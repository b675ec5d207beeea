"""The sizes of the mesh axes. Imports no JAX."""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveInt
from jaxinfra.errors import ConfigError

type MeshAxis = Literal["replica", "stage", "fsdp", "expert", "context", "tensor"]
type AxisSize = Literal[-1] | PositiveInt


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The size of every mesh axis; one axis may be -1, which uses the remaining devices.

    Attributes:
        replica: data parallel, usually between slices; gradients are all-reduced once a step.
        stage: pipeline stages.
        fsdp: data parallel with sharded parameters, gradients and optimizer state.
        expert: data parallel with sharded experts; all other parameters are sharded as over fsdp.
        context: number of shards of a sequence.
        tensor: number of shards of heads, MLP and vocabulary.
    """

    replica: AxisSize = 1
    stage: AxisSize = 1
    fsdp: AxisSize = -1
    expert: AxisSize = 1
    context: AxisSize = 1
    tensor: AxisSize = 1

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if several sizes are -1."""
        if len(free := self._free) > 1:
            yield Problem(fields=free, message="only one mesh axis may be -1", fix=f"set a size for {free[0]}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return astuple(self)

    def shards(self, *axes: str) -> int:
        """Returns the number of devices over some axes."""
        return math.prod(getattr(self, axis) for axis in axes)

    @property
    def _free(self) -> tuple[str, ...]:
        """The axes of size -1."""
        return tuple(axis for axis, size in zip(AXES, self.sizes, strict=True) if size == -1)

    def resolve(self, devices: int) -> "MeshConfig":
        """Replaces -1 so that the sizes multiply to `devices`; raises ConfigError if they cannot."""
        free, known = self._free, [size for size in self.sizes if size != -1]
        if len(free) > 1 or not all(isinstance(size, int) and size > 0 for size in known):
            return self  # `validate` names what is wrong
        fixed = math.prod(known)
        if devices == fixed or (free and devices % fixed == 0):
            return replace(self, **{axis: devices // fixed for axis in free})
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size != 1)
        if free:
            fix = f"use sizes of the other axes that divide {devices}"
        else:
            all_devices = "" if devices % (fixed // self.fsdp) else "mesh.fsdp=-1 to use all devices, or "
            fix = f"use {all_devices}--devices cpu:{fixed} to emulate them"
        raise ConfigError(f"{named or 'mesh'}: needs {fixed} devices, found {devices}; {fix}")


AXES: tuple[str, ...] = tuple(field.name for field in fields(MeshConfig))
"""The names of the mesh axes, from the slowest links to the fastest."""
