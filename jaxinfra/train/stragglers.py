"""Finds the process that holds up the others: steps are collective, so that all take the time of the slowest."""

import logging
import time
from functools import cached_property
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfra.processes.peers import Peers
from jaxinfra.track.planned import SLOW_DEVICES
from jaxinfra.train.phases import Phases

PROBE_EVERY = 50
"""Steps between two measurements of how fast the devices compute."""
_PROBED_MATMULS = 8
_PROBED_SHARE = 0.5
"""Of a step that a measurement lasts on CPUs. Other programs get their turn only when one has computed for a while."""

_log = logging.getLogger(__name__)


class Stragglers:
    """Measures in each process what holds up the others, and names the slowest one.

    The host: how long the devices had nothing to do because the process had not dispatched the next step. That is the
    time of its loop outside of waiting for the devices, in steps that were done before the loop came to wait for them.

    The devices: how long each takes for the same few matmuls, which exchange nothing. Within a step the others wait for
    slow devices in a collective, which looks the same from all processes.
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
        self._suspects: dict[str, int | None] = {}  # the slow process of the last measurement of the host, the devices
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

    def probes_after(self, step: int) -> bool:
        """Whether all processes measure their devices after a step; they must have computed it."""
        return self._peers.count > 1 and step % PROBE_EVERY == 0

    def probe_devices(self, step: int) -> None:
        """Measures the devices of this process, and has process 0 compare them with those of the others."""
        with self._phases("device"):
            probe_s = self._probe.measure(self._phases.median_step_s() or 0.0)
        self._peers.collect(probe_s, "devices", lambda values: self.judge_devices(step, values))

    def judge(self, step: int, values: list[list[float] | None]) -> None:
        """Compares the own time and the step time of all processes; warns once of each that holds up the others."""
        own_s = [value[0] for value in values if value is not None]
        step_s = median(value[1] for value in values if value is not None)
        if len(own_s) < len(values):  # a process has ended
            return
        slowest, others_s = _slowest(own_s)
        excess_s = own_s[slowest] - others_s
        self._host_metrics = {"slowest_process": float(slowest), "slowest_process_s": own_s[slowest]}
        self._host_metrics["slowest_process_excess_s"] = excess_s
        if self._is_news("host", slowest, is_slow=excess_s > max(self.SHARE * step_s, self.LEAST_S)):
            _log.warning(
                "step %d: %s holds up the others: the devices wait %.0f ms of each step of %.0f ms for its host, which "
                "the others do not; look at its processor, its disk and its data",
                step,
                self._peers.name_of(slowest),
                1e3 * own_s[slowest],
                1e3 * step_s,
            )

    def judge_devices(self, step: int, values: list[float | None]) -> None:
        """Compares the times of the same matmuls in all processes; warns once of each whose devices are slow."""
        times_s = [value for value in values if value is not None]
        if len(times_s) < len(values):
            return
        slowest, others_s = _slowest(times_s)
        slowdown = times_s[slowest] / others_s
        self._device_metrics = {"slowest_devices": float(slowest), "slowest_devices_slowdown": slowdown}
        if self._is_news("devices", slowest, is_slow=slowdown > SLOW_DEVICES):
            _log.warning(
                "step %d: the devices of %s compute slowly, and all wait for them: they take %.2f ms for matmuls that "
                "take the others %.2f ms; look at their clock, their temperature, and what else runs there",
                step,
                self._peers.name_of(slowest),
                1e3 * times_s[slowest],
                1e3 * others_s,
            )

    def _is_news(self, what: str, slowest: int, *, is_slow: bool) -> bool:
        """Whether two measurements in a row found the same process slow, of which no warning was given yet."""
        suspect, self._suspects[what] = self._suspects.get(what), slowest if is_slow else None
        if not is_slow or suspect != slowest or (what, slowest) in self._named:
            return False
        self._named.add((what, slowest))
        return True


def _slowest(times_s: list[float]) -> tuple[int, float]:
    """Returns the process of the longest time, and the median time of the others."""
    slowest = max(range(len(times_s)), key=times_s.__getitem__)
    return slowest, median(times_s[:slowest] + times_s[slowest + 1 :])


class DeviceProbe:
    """Times the same few matmuls on the devices of this process.

    Attributes:
        runs: how often the last measurement ran them.
    """

    runs = 0

    @cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.local_devices()), ("local",))

    @property
    def _is_cpu(self) -> bool:
        return self._mesh.devices.flat[0].platform == "cpu"

    @cached_property
    def _matrices(self) -> jax.Array:
        """The identity, float32 on CPUs and bfloat16 elsewhere, on each device: [devices, n, n]."""
        identity = np.eye(256, dtype=np.float32) if self._is_cpu else np.eye(4096, dtype=jnp.bfloat16)
        identities = np.broadcast_to(identity, (self._mesh.size, *identity.shape))
        return jax.device_put(identities, NamedSharding(self._mesh, PartitionSpec("local")))

    def measure(self, step_s: float) -> float:
        """Returns the seconds that the slowest device takes for them. Nothing else must be queued on the devices."""
        self._run()  # compiles the first time
        least_s = _PROBED_SHARE * step_s if self._is_cpu else 0.0
        self.runs, start_s, took_s = 0, time.perf_counter(), 0.0
        while self.runs == 0 or took_s < least_s:
            self._run()
            self.runs, took_s = self.runs + 1, time.perf_counter() - start_s
        return took_s / self.runs

    def _run(self) -> None:
        with jax.set_mesh(self._mesh):  # the mesh of the run has devices of other processes, too
            _multiply(self._matrices).block_until_ready()


@jax.jit
def _multiply(matrices: jax.Array) -> jax.Array:
    """Multiplies matrices [devices, n, n] with themselves a few times."""
    return jax.lax.fori_loop(0, _PROBED_MATMULS, lambda _, product: product @ matrices, matrices)
