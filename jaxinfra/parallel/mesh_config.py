"""The sizes of the mesh axes. Imports no JAX."""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count
from jaxinfra.errors import ConfigError

type MeshAxis = Literal["replica", "stage", "fsdp", "expert", "context", "tensor"]
type AxisSize = Literal[-1] | Count


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The size of every mesh axis; at most one may be -1, which takes the devices that are left.

    Attributes:
        replica: copies of the parameters, one a slice where there are several; gradients meet once a step.
        stage: pipeline stages.
        fsdp: data parallel with parameters, gradients and optimiser state sharded.
        expert: data parallel, with the experts of a layer shared out; all other parameters are sharded as over fsdp.
        context: shards of a sequence.
        tensor: shards of heads, MLP width and vocabulary.
    """

    replica: AxisSize = 1
    stage: AxisSize = 1
    fsdp: AxisSize = -1
    expert: AxisSize = 1
    context: AxisSize = 1
    tensor: AxisSize = 1

    def problems(self) -> Iterable[Problem]:
        """At most one size is -1."""
        if len(free := self._free) > 1:
            yield Problem(fields=free, message="only one mesh axis may be -1", fix=f"give {free[0]} a size")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return astuple(self)

    @property
    def _free(self) -> tuple[str, ...]:
        return tuple(axis for axis, size in zip(AXES, self.sizes, strict=True) if size == -1)

    def resolve(self, devices: int) -> "MeshConfig":
        """The same mesh with -1 replaced, for `devices` devices; a ConfigError where the sizes multiply to others."""
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size != 1)
        fixed = math.prod(size for size in self.sizes if size != -1)
        free = self._free[:1]
        fits = devices % fixed == 0 if free else devices == fixed
        if fits:
            return replace(self, **{axis: devices // fixed for axis in free})
        fix = f"use --devices cpu:{fixed} to emulate them, or mesh.fsdp=-1 to take what is there"
        if free:
            fix = f"the other axes must divide {devices}"
        raise ConfigError(f"{named or 'mesh'}: asks for {fixed} devices, {devices} here; {fix}")


AXES: tuple[str, ...] = tuple(field.name for field in fields(MeshConfig))
