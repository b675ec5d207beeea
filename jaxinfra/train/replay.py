"""Computes a step again with the work of each device on another one, to find a device that computes wrong.

In canonical mode the bits of a step do not depend on the devices. A replay moves the state and the batch along the mesh
and runs the same program there, from forward to optimizer. It compares what each device has computed, part by part: the
gradient of each virtual shard, sums, the new state. If a part differs, a third computation elsewhere says which of the
two was right, and so names the device (`find_wrong`).

Two copies of the state are on the devices meanwhile: the one before the step, and the one that is computed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxinfra.errors import CorruptionError
from jaxinfra.parallel.canonical import DIGESTS
from jaxinfra.parallel.mesh import Device, permute_devices
from jaxinfra.parallel.spec import Batch, PyTree
from jaxinfra.processes.peers import Peers
from jaxinfra.program import Metrics, Program, TrainState
from jaxinfra.train.phases import Phases
from jaxinfra.train.replicas import ReplicaCheck, minority

_STATE = "state"
_IN_WORDS = {
    "weights": "the gathered weights differ",
    "shards": "the gradient of virtual shard {} differs",
    "sums": "the sum of the gradients of device {} of the mesh differs",
    "parts": "the gradient that the devices have added up differs",
    _STATE: "the new {} differs",
}
"""Words for each part that may differ, in the order of the computation: all that follows a wrong part is wrong, too."""
_COLLECTIVES = ("weights", "parts")
"""Parts that a device has from others: any of them, or a link between them, may be the cause."""


class Computed(NamedTuple):
    """Holds digests of all that the devices have computed in a step.

    Attributes:
        devices: in the order of the mesh.
        digests: by what they are of; the last dimension is split evenly among the devices, in order.
    """

    devices: Sequence[Device]
    digests: Mapping[str, np.ndarray]


class Finding(NamedTuple):
    """The first part of a step that differs between computations, and the devices that may have computed it wrong."""

    stage: str
    part: tuple[int, ...]
    devices: Sequence[Device]


def find_wrong(computed: Sequence[Computed]) -> Finding | None:
    """Compares computations of one step, in each of which another device has each part; None if they agree.

    Of three, the device is named that disagrees with two others; of two, both are.
    """
    for stage in _IN_WORDS:  # not in the order of the digests, which JAX sorts by name
        found = np.stack([each.digests[stage] for each in computed])
        indices = np.argwhere((found != found[0]).any(axis=0))
        if not len(indices):
            continue
        suspects = {*computed[0].devices} if stage in _COLLECTIVES else set[Device]()
        for *rest, part in indices:
            values = found[(slice(None), *rest, part)]
            holders = [each.devices[part * len(each.devices) // found.shape[-1]] for each in computed]
            suspects |= {*minority(dict(zip(holders, values.tolist(), strict=True)))}
        return Finding(stage, tuple(indices[0].tolist()), sorted(suspects, key=lambda device: device.id))
    return None


class Replay:
    """Makes steps of a run, and computes them again on other devices.

    Args:
        program: of the run.
        peers: its processes.
        phases: its phases.
        say: shows a line about a step to people.
    """

    def __init__(self, program: Program, peers: Peers, phases: Phases, say: Callable[[int, str], object]) -> None:
        self._program, self._peers, self._phases, self._say = program, peers, phases, say
        count, local = program.mesh.size, program.mesh.size // peers.count
        # By all devices of a process first: those of a host may fail together.
        self._shifts = [shift for shift in dict.fromkeys((local, 2 * local, 1, 2)) if 0 < shift < count][:2]
        self._shifted: dict[int, _Shifted] = {}

    def step(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Makes a step, counted from 1, as `Program.train_step`, but leaves the state that it is given.

        Raises CorruptionError, in all processes, if another computation of it has other bits.
        """
        before_s = self._phases.seconds()
        with self._phases("replay"):
            again = self._compute(self._shifts[0], state, batch)[2]
        with self._phases("device"):
            new_state, metrics, computed = self._compute(0, state, batch)
        with self._phases("replay"):
            # Process 0 decides: if a link is the cause, the others may have got other digests.
            if self._peers.broadcast(find_wrong([computed, again]) is not None):
                del new_state
                third = [self._compute(shift, state, batch)[2] for shift in self._shifts[1:]]
                found = find_wrong([computed, again, *third])
                raise CorruptionError(*self._peers.broadcast(found and self._in_words(step, found)))
        replay_s, step_s = (self._phases.seconds()[phase] - before_s[phase] for phase in ("replay", "device"))
        self._say(step, f"replay: the same bits on other devices; {replay_s:.2f} s, the step itself {step_s:.2f} s")
        return new_state, metrics

    def _compute(self, shift: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, Computed]:
        if shift not in self._shifted:
            self._shifted[shift] = _Shifted(self._program, shift)
        with self._phases.first(f"replay {shift}"):
            state, metrics = self._shifted[shift].train_step(state, batch)
        return state, metrics, self._shifted[shift].computed(state, metrics)

    def _in_words(self, step: int, found: Finding) -> tuple[str, list[int]]:
        """Returns the message, and the indices of the processes that it names."""
        part, peers = found.part[0], self._peers
        what = _IN_WORDS[found.stage].format(self._shifted[0].leaves[part] if found.stage == _STATE else part)
        named = " or ".join(f"device {each.id} of {peers.name_of(each.process_index)}" for each in found.devices)
        processes = sorted({each.process_index for each in found.devices})
        return f"step {step}: {named}: computes wrong: {what} when another device computes it", processes


class _Shifted:
    """The train step with the work of each device on the one that is `shift` further in the order of the mesh.

    Attributes:
        leaves: names of the parts of the state whose bits are compared.
    """

    def __init__(self, program: Program, shift: int) -> None:
        assert isinstance(program.mesh, jax.sharding.Mesh)
        self._order = [(position + shift) % program.mesh.size for position in range(program.mesh.size)]
        self._mesh = permute_devices(program.mesh, self._order)
        self._program = Program(program.run, self._mesh, program.partitioner.platform, with_digests=True)
        self._check = ReplicaCheck(self._mesh, self._program.state)
        self.leaves = [name for name, _ in self._check.leaves]

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Makes the step there, with copies of the state and the batch."""
        arrays = jax.tree.map(self._as_shifted, self._send((state, batch)))
        with self._program.on_mesh:
            return self._program.train_step(*arrays)

    def computed(self, state: TrainState, metrics: Metrics) -> Computed:
        """Returns what was computed for a new state, and takes the digests out of its metrics."""
        digests = jax.device_get({name: metrics.pop(name) for name in DIGESTS})
        return Computed([*np.asarray(self._mesh.devices).flat], digests | {_STATE: self._check.sums(state)})

    @cached_property
    def _send(self) -> Callable[[PyTree], PyTree]:
        """The compiled function that sends the shards of all arrays to the devices of their new positions."""

        def send(arrays: PyTree) -> PyTree:
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arrays)
            permute = partial(jax.lax.ppermute, axis_name=self._mesh.axis_names, perm=[*enumerate(self._order)])
            on_devices = jax.shard_map(
                partial(jax.tree.map, permute), in_specs=(specs,), out_specs=specs, check_vma=False
            )
            return on_devices(arrays)

        return jax.jit(send)

    def _as_shifted(self, sent: jax.Array) -> jax.Array:
        """Returns the array whose shards are at their new positions."""
        sharding = NamedSharding(self._mesh, jax.typeof(sent).sharding.spec)
        shards = [shard.data for shard in sent.addressable_shards]
        return jax.make_array_from_single_device_arrays(sent.shape, sharding, shards)
