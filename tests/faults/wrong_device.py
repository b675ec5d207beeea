"""Row 48: a device that computes wrong. It flips one bit of what it computes, in each step or at random in some.

The device is one of the machine, not a position in the mesh: the fault stays with it when its work is moved elsewhere.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.mesh import get_concrete_mesh  # that of `jax.sharding` refuses to be called while a function is traced

from jaxinfra.config import load
from jaxinfra.errors import CorruptionError
from jaxinfra.launchers.rendezvous import FOLDER
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.parallel.mesh_config import AXES
from jaxinfra.processes.peer_connection import free_port
from jaxinfra.program import Program, TrainState
from jaxinfra.run import Run
from jaxinfra.train.phases import Phases
from jaxinfra.train.replay import Replay
from jaxinfra.train.trainer import Trainer
from tests.faults.harness import TIMEOUT_S, Harness, named, require, wait
from tests.faults.matrix import row

WRONG = "JAXINFRA_FAULTS_WRONG"
"""The variable that says which device computes wrong: `WHERE:DEVICE:SHARE:AFTER`, as in `Wrong`."""
PLACES = ("forward", "backward", "optimizer")
_BIT = 12  # of the mantissa
_MOST_STEPS = 100  # until a fault has acted


class Wrong(NamedTuple):
    """Describes the fault of a device."""

    where: str  # one of `PLACES`
    device: int  # number among the devices of all processes, by their ids
    share: float  # of the times that it computes wrong; 1 is always
    after: int = 0  # number of completed steps, of an optimizer


class _Machine:
    """The machine of this process."""

    wrong: Wrong | None = None
    draw = random.Random(0)


def is_wrong(where: str, device: int) -> bool:
    """Whether a device, given by its id, computes wrong this time."""
    wrong = _Machine.wrong
    if wrong is None or wrong.where != where or sorted(each.id for each in jax.devices())[wrong.device] != device:
        return False
    return _Machine.draw.random() < wrong.share


def _flip_first(where: str, x: jax.Array) -> jax.Array:
    """Returns a float32 array, of which the wrong device flips a bit of the first element."""
    devices = [each.id for each in get_concrete_mesh().devices.flat]

    def mask(position: Any) -> np.uint32:
        return np.uint32(is_wrong(where, devices[int(position)]) << _BIT)

    found = jax.pure_callback(mask, jax.ShapeDtypeStruct((), jnp.uint32), jax.lax.axis_index(AXES))
    is_first = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) == 0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ jnp.where(is_first, found, 0)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_vjp
def _computed(x: jax.Array) -> jax.Array:
    """Returns an array as the device reads it in the forward pass; its gradient is as the device computes it."""
    return _flip_first("forward", x)


_computed.defvjp(lambda x: (_computed(x), None), lambda _, grad: (_flip_first("backward", grad),))


@dataclass(frozen=True, kw_only=True)
class OnDeviceLM(CausalLM):
    """The loss as the devices compute it."""

    @override
    def loss(self, apply: Any, params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        leaves, tree = jax.tree.flatten(params)
        return super().loss(apply, jax.tree.unflatten(tree, [_computed(leaves[0]), *leaves[1:]]), batch)


def _updated(state: TrainState) -> TrainState:
    """Returns the state as the devices have updated it."""
    if _Machine.wrong is None or int(state.step) <= _Machine.wrong.after:
        return state
    leaves, tree = jax.tree.flatten(state.params)
    shards = leaves[0].addressable_shards
    values = [np.array(shard.data) for shard in shards]
    for value, shard in zip(values, shards, strict=True):
        value.reshape(-1).view(np.uint32)[:1] ^= np.uint32(is_wrong("optimizer", shard.device.id) << _BIT)
    placed = [jax.device_put(value, shard.device) for value, shard in zip(values, shards, strict=True)]
    leaves[0] = jax.make_array_from_single_device_arrays(leaves[0].shape, leaves[0].sharding, placed)
    return replace(state, params=jax.tree.unflatten(tree, leaves))


class _OnDevices(cached_property[Any]):
    """`Program.train_step` as the devices compute it."""

    def __init__(self, sound: Callable[[Program], Any]) -> None:
        def train_step(program: Program) -> Any:
            step = sound(program)

            def on_devices(state: TrainState, batch: Any) -> Any:
                state, metrics = step(state, batch)
                return _updated(state), metrics

            vars(on_devices).update(lower=step.lower)  # what a step needs is asked before it is called
            return on_devices

        super().__init__(train_step)
        self.__set_name__(Program, "train_step")


def with_devices(run: Run, *, is_compiled: bool = True) -> Run:
    """Returns a run on the devices of this machine, of which one may compute wrong, as `WRONG` says.

    Without `is_compiled` it may do so only in the optimizer; then programs stay as they are.
    """
    sound = vars(Program)["train_step"]
    if not isinstance(sound, _OnDevices):
        type.__setattr__(Program, "train_step", _OnDevices(sound.func))
    if WRONG in os.environ:
        where, device, share, after = os.environ[WRONG].split(":")
        _Machine.wrong = Wrong(where, int(device), float(share), int(after))
    return replace(run, objective=OnDeviceLM()) if is_compiled else run


def sweep(words: Sequence[str], seed: int, num_faults: int, sound_steps: int) -> None:
    """Prints for how many faults the right device was named, and the cost; an alarm in a sound step is an exception.

    All steps are computed again. `words` are a config and overrides.
    """
    trainer = Trainer(with_devices(load(words[0], words[1:], root=Run).run))
    program, data, said, draw = trainer.program, trainer.dataset, list[str](), random.Random(seed)
    replay = Replay(program, trainer.job.peers, Phases(), lambda step, line: said.append(line))
    ids = [data.sample_ids(step, trainer.run.train.global_batch) for step in range(8)]
    right = 0
    with program.on_mesh:
        batches = [trainer.job.data.place(data.train.read(each, weighted=False)) for each in ids]
        state = program.init(jax.random.key(0))
        for step in range(sound_steps):
            state, _ = replay.step(step + 1, state, batches[step % len(batches)])
        for number in range(num_faults):
            device, share = draw.randrange(program.mesh.size), draw.choice((1.0, 0.5, 0.1))
            _Machine.wrong = wrong = Wrong(PLACES[number % len(PLACES)], device, share)
            try:
                for step in range(_MOST_STEPS):
                    replay.step(step + 1, state, batches[step % len(batches)])
            except CorruptionError as error:
                is_right = f": device {device} of process 0" in str(error) and " or " not in str(error)
                right += is_right
                if not is_right:
                    print(wrong, error, file=sys.stderr)
    print(json.dumps({"right": right, "last": said[sound_steps - 1]}))


def _sweep(harness: Harness, faults: int, sound_steps: int, canonical: int) -> str:
    """Injects faults on four devices of one process."""
    changes = ("model.num_layers=1", "mesh.fsdp=4", f"train.canonical={canonical}", "guard.replay_every=1")
    words = harness.words("wrong-devices", *changes)
    command = f"from tests.faults.wrong_device import sweep; sweep({words}, {harness.seed}, {faults}, {sound_steps})"
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
        check=False,
    )
    require(ended.returncode == 0, ended.stderr[-2000:])
    found = json.loads(ended.stdout)
    require(found["right"] == faults, f"{found['right']} of {faults} named: {ended.stderr[-2000:]}")
    return f"named in {faults} of {faults}, 0 alarms in {sound_steps:,} sound steps, {found['last']}"


@row(
    48,
    fault="a device that computes one bit wrong, always or sometimes",
    must="a replay on other devices names it; 83, or goes on without it",
)
def wrong_device(harness: Harness) -> str:
    """Tries faults in one process; with `--long` many, and in several processes, of which an elastic run loses one."""
    if not harness.is_long:
        return _sweep(harness, faults=6, sound_steps=5, canonical=4)
    texts = _sweep(harness, faults=50, sound_steps=1000, canonical=8), _several(harness), _elastic(harness)
    return "; ".join(texts)


def _config(harness: Harness, name: str, *, is_compiled: bool) -> Path:
    """Writes the config of a run with `with_devices`."""
    path = harness.write_config(name, f"with_devices(base.config(), is_compiled={is_compiled})")
    path.write_text(f"from tests.faults.wrong_device import with_devices\n{path.read_text()}")
    return path


def _several(harness: Harness) -> str:
    """The backward pass of a device of process 1 computes wrong at times."""
    name, words = "wrong-process", ("train.canonical=8", "mesh.replica=2", "mesh.fsdp=2", "guard.replay_every=1")
    path = _config(harness, name, is_compiled=True)
    ended = harness.train(name, *words, processes=2, devices=4, config=path, env={WRONG: "backward:2:0.1:0"})
    require(ended.code == CorruptionError.exit_code, ended)
    line = next(line for line in ended.err.splitlines() if "computes wrong" in line)
    named(line, ": device ", " of process 1 ", "the gradient of virtual shard")
    require(" or device" not in line, line)
    return "83 on two processes, the device named"


def _elastic(harness: Harness) -> str:
    """The optimizer of a device of host 1 computes wrong from step 13 on."""
    name, steps = "wrong-host", 30
    words = ("train.canonical=8", f"train.steps={steps}")
    reference, path = harness.reference(*words, devices=2, steps=steps), _config(harness, name, is_compiled=False)
    several = (f"--coordinator=127.0.0.1:{free_port('127.0.0.1')}", "--of=2", "--elastic=1..2", "--elastic-wait=2")
    words = (*words, "mesh.fsdp=-1", "guard.replay_every=5", *several, "--supervise")
    with ExitStack() as opened:
        hosts = [
            opened.enter_context(
                harness.started(name, *words, f"--process-id={index}", devices=2, config=path, env=env)
            )
            for index, env in enumerate(({}, {WRONG: "optimizer:3:1:12"}))
        ]
        sound, wrong = (wait(host) for host in hosts)
    require(wrong.code == CorruptionError.exit_code and sound.code == 0, (wrong, sound))
    line = next(line for line in wrong.err.splitlines() if "computes wrong" in line)
    named(line, "step 15: device ", " of process 1 ", "the newest checkpoint is 10")
    require(" or device" not in line, line)
    named(sound.err, "go on without this one")
    rounds = sorted((harness.run(name).path / FOLDER).glob("round-*.json"))
    sizes = [len(json.loads(each.read_text())["hosts"]) for each in rounds]
    require(sizes[:2] == [2, 1], sizes)
    return f"83 at step 15 on one host of two, the other goes on from step 10; {harness.same_bits(name, reference)}"
