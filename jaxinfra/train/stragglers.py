"""Finds the process that holds up the others: steps are collective, so that all take the time of the slowest."""

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxinfra.processes.peers import Peers
from jaxinfra.track.planned import SLOW_DEVICES
from jaxinfra.train.phases import Phases

PROBE_EVERY = 30
"""Steps between two measurements of how fast the devices compute."""
_PROBED_SHARE, _PROBED_S = 0.3, (0.03, 1.0)
"""How long a measurement lasts: as a share of a step, so that it takes 1 % of the time; not at all below the first
limit, where a thread of Python that is late would count, and never longer than the second."""
_FIRST_MATMULS = 8  # to see how many fit in that time
_LONG_ENOUGH = 0.8  # of that time

_log = logging.getLogger(__name__)


class Stragglers:
    """Measures in each process what holds up the others, and names those that do.

    The host: how long the devices had nothing to do because the process had not dispatched the next step. That is the
    time of its loop outside of waiting for the devices, in steps that were done before the loop came to wait for them.

    The devices: how long the slowest takes for matmuls, which exchange nothing. Within a step the others wait for slow
    devices in a collective, which looks the same from all processes.
    """

    WINDOW = 5
    """Steps of a measurement of the host; two in a row must agree."""
    SHARE = 0.15
    """A process is slow if its time exceeds the median of the others by more than this share of the step time."""
    LEAST_S = 0.005
    """Smaller excesses do not count, since process 0 also logs."""

    def __init__(self, phases: Phases, peers: Peers) -> None:
        self._phases, self._peers, self._probe = phases, peers, DeviceProbe()
        self._host_metrics: dict[str, float] = {}
        self._device_metrics: dict[str, float] = {}
        self._steps, self._own_s, self._loop_s, self._since_s = 0, 0.0, 0.0, self._seconds()
        self._suspects: dict[str, set[int]] = {}  # the slow processes of the last measurement of the host, the devices
        self._named = set[tuple[str, int]]()  # what a warning has named

    @property
    def metrics(self) -> dict[str, float]:
        """The last measurements, in process 0."""
        return self._host_metrics | self._device_metrics

    def _seconds(self) -> tuple[float, float]:
        """Returns the time of the loop so far, first without and then with the waits for the devices."""
        seconds = self._phases.seconds()
        own_s = seconds["step"] + seconds["data"]
        return own_s, own_s + seconds["device"]

    def finish_step(self, step: int, *, was_ready: bool) -> None:
        """Counts a step that has ended; `was_ready` says whether it had ended before the loop came to wait for it."""
        if self._peers.count == 1:
            return
        own_s, loop_s = self._seconds()
        if was_ready:
            self._own_s += own_s - self._since_s[0]
        self._loop_s += loop_s - self._since_s[1]
        self._since_s, self._steps = (own_s, loop_s), self._steps + 1
        if step % self.WINDOW == 0:
            value = [self._own_s / self._steps, self._loop_s / self._steps]
            self._peers.collect(value, "stragglers", lambda values: self.judge(step, values))
            self._steps, self._own_s, self._loop_s = 0, 0.0, 0.0

    def begin(self, completed_steps: int, last_step: int) -> None:
        """Compiles the matmuls, if there are enough steps to measure the devices after one."""
        if any(map(self.probes_after, range(completed_steps + 1, min(last_step, completed_steps + PROBE_EVERY + 1)))):
            self._probe.measure(0.0)

    def probes_after(self, step: int) -> bool:
        """Whether all processes measure their devices after a step; they must have computed it."""
        return self._peers.count > 1 and step % PROBE_EVERY == 0

    def probe_devices(self, step: int, *, skip: bool) -> None:
        """Measures the devices of this process, and has process 0 compare them with those of the others.

        With `skip` this process has nothing to compare, and no process is judged.
        """
        least_s, most_s = _PROBED_S
        lasts_s = 0.0 if skip else min(_PROBED_SHARE * (self._phases.median_step_s() or 0.0), most_s)
        with self._phases("device"):
            matmul_s = self._probe.measure(lasts_s) if lasts_s >= least_s else None
        self._peers.collect(matmul_s, "devices", lambda values: self.judge_devices(step, values))

    def judge(self, step: int, values: list[list[float] | None]) -> None:
        """Compares the own time and the step time of all processes; warns once of each that holds up the others."""
        own_s = [value[0] for value in values if value is not None]
        step_s = median(value[1] for value in values if value is not None)
        if len(own_s) < len(values):  # a process has ended
            return
        slowest = max(range(len(own_s)), key=own_s.__getitem__)
        self._host_metrics = {"slowest_process": float(slowest), "slowest_process_s": own_s[slowest]}
        self._host_metrics["slowest_process_excess_s"] = own_s[slowest] - _others(own_s, slowest)
        excess_s = max(self.SHARE * step_s, self.LEAST_S)
        for process in self._news("host", own_s, lambda own, others: own - others > excess_s):
            _log.warning(
                "step %d: %s holds up the others: the devices wait %.0f ms of each step of %.0f ms for its host, which "
                "the others do not; look at its processor, its disk and its data",
                step,
                self._peers.name_of(process),
                1e3 * own_s[process],
                1e3 * step_s,
            )

    def judge_devices(self, step: int, values: list[float | None]) -> None:
        """Compares the seconds of a matmul in all processes; warns once of each whose devices are slow."""
        times_s = [value for value in values if value is not None]
        if len(times_s) < len(values):  # a process has ended, or could not measure them
            return
        slowest = max(range(len(times_s)), key=times_s.__getitem__)
        slowdown = times_s[slowest] / _others(times_s, slowest)
        self._device_metrics = {"slowest_devices": float(slowest), "slowest_devices_slowdown": slowdown}
        for process in self._news("devices", times_s, lambda own, others: own > SLOW_DEVICES * others):
            _log.warning(
                "step %d: the devices of %s compute slowly, and all wait for them: matmuls take them %.1f times as "
                "long as the others; look at their clock, their temperature, and what else runs there",
                step,
                self._peers.name_of(process),
                times_s[process] / _others(times_s, process),
            )

    def _news(self, what: str, times_s: Sequence[float], is_slow: Callable[[float, float], bool]) -> list[int]:
        """Returns the processes that two measurements in a row found slow, and of which no warning was given yet.

        `is_slow` compares the time of a process with the median of the others.
        """
        slow = {process for process, own_s in enumerate(times_s) if is_slow(own_s, _others(times_s, process))}
        before, self._suspects[what] = self._suspects.get(what, set()), slow
        news = [process for process in sorted(slow & before) if (what, process) not in self._named]
        self._named |= {(what, process) for process in news}
        return news


def _others(times_s: Sequence[float], process: int) -> float:
    """Returns the median time of the other processes."""
    return median([*times_s[:process], *times_s[process + 1 :]])


class DeviceProbe:
    """Times matmuls on the devices of this process."""

    def __init__(self) -> None:
        self._matmul_s: float | None = None

    def measure(self, lasts_s: float) -> float | None:
        """Returns the seconds that the slowest device takes for a matmul; None, with a warning, if that fails.

        It lasts for about as long as it should, at least for one matmul; the first time it also compiles. Nothing else
        must be queued on the devices.
        """
        try:
            if self._matmul_s is None:
                self._run(1)
                self._matmul_s = self._run(_FIRST_MATMULS) / _FIRST_MATMULS
            matmuls, took_s = 0, 0.0
            while matmuls == 0 or took_s < _LONG_ENOUGH * lasts_s:  # the last time they may have been slower
                more = max(1, math.ceil((lasts_s - took_s) / self._matmul_s))
                took_s, matmuls = took_s + self._run(more), matmuls + more
                self._matmul_s = took_s / matmuls
        except jax.errors.JaxRuntimeError as error:  # such as no memory
            _log.warning("the speed of the devices is not measured: %s; training goes on", str(error).splitlines()[0])
            return None
        return self._matmul_s

    def _run(self, matmuls: int) -> float:
        """Returns the seconds of a number of matmuls on each device."""
        begin_s = time.perf_counter()
        with jax.set_mesh(_local_mesh()):  # the mesh of the run has devices of other processes, too
            _multiply(matmuls).block_until_ready()
        return time.perf_counter() - begin_s


@functools.cache
def _local_mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("local",))


@jax.jit
def _multiply(matmuls: int | jax.Array) -> jax.Array:
    """Multiplies the identity with itself on each device of the mesh; returns one number of each product: [devices].

    The matrices are float32 [256, 256] on CPUs, bfloat16 [2048, 2048] elsewhere, where the three of them take 24 MiB.
    """
    is_cpu = jax.local_devices()[0].platform == "cpu"
    size, dtype = (256, jnp.float32) if is_cpu else (2048, jnp.bfloat16)

    def multiply(matmuls: int | jax.Array) -> jax.Array:
        identity = jnp.eye(size, dtype=dtype)
        product = jax.lax.fori_loop(0, matmuls, lambda _, product: product @ identity, identity)
        return product[:1, 0]

    return jax.shard_map(multiply, in_specs=PartitionSpec(), out_specs=PartitionSpec("local"), check_vma=False)(matmuls)
