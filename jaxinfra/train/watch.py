"""Watches a training from the outside: its ledger of time, and its deadlines."""

import math
import threading
import time
from typing import Any, Self

from jaxinfra.errors import Preempted
from jaxinfra.machine.stacks import StackFiles
from jaxinfra.processes.config import WatchdogConfig
from jaxinfra.processes.peers import Peers
from jaxinfra.run_dir import RunDirectory
from jaxinfra.train.energy import Energy
from jaxinfra.train.ledger import Ledger
from jaxinfra.train.phases import Phases, attempt_start_s
from jaxinfra.train.stragglers import Stragglers

_LOOK_S = 1.0
"""Time between two looks at the progress."""
_STOPPED_S = 5.0
"""A look that comes this much too late was held up by a stop of the whole process."""


class Watch:
    """A context manager around a training: a thread that ends it if it hangs, and in process 0 its ledger.

    Attributes:
        phases: the phases that the training declares.
        ledger: the ledger of the phases, which is opened in process 0 while it owns the directory of the run.
        stragglers: finds the processes that hold up the others.
        energy: measures what the devices use.
    """

    def __init__(self, config: WatchdogConfig, run_dir: RunDirectory, peers: Peers, energy: Energy) -> None:
        self.phases, self._config, self._run_dir, self._peers = Phases(), config, run_dir, peers
        self.ledger, self.stragglers = Ledger(self.phases), Stragglers(self.phases, peers)
        self.energy, self.ledger.joules = energy, lambda: energy.joules
        self._ended, self._thread = threading.Event(), threading.Thread()

    def __enter__(self) -> Self:
        self.phases.restart(attempt_start_s())
        self._peers.stacks = StackFiles(self._run_dir.location, self._peers.index)
        self._peers.progress = lambda: {"step": self.phases.begun, "phase": _in_words(self.phases.current)}
        self._ended.clear()
        self._thread = threading.Thread(target=self._look_regularly, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._peers.stacks, self._peers.progress, self._peers.settled = None, dict, None

    def settle(self, reason: str, ending: Preempted) -> None:
        """Records why the training has stopped, and that it is saved.

        If something hangs from now on, the process ends with `ending` all the same.
        """
        self._peers.settled = ending
        self.ledger.write(stopped=reason)

    def _look_regularly(self) -> None:
        """Ends all processes once a phase has made no progress for longer than its deadline; runs in a thread."""
        deadlines_s = [each for name, each in vars(self._config).items() if name.endswith("_s") and each is not None]
        look_s = min(_LOOK_S, *(each / 4 for each in deadlines_s))
        looked_s, woke_s = time.monotonic(), -math.inf
        while not self._ended.wait(look_s):
            looked_before_s, looked_s = looked_s, time.monotonic()
            if looked_s - looked_before_s > look_s + _STOPPED_S:
                woke_s = looked_s  # this process was stopped, as by Ctrl-Z
            phase = self.phases.current
            limit_s = deadline_s(self._config, self.phases, phase)
            if self._peers.settled is not None:
                limit_s = self._config.end_s
            idle_s = min(self.phases.idle_s(), looked_s - woke_s)  # read last: it is short if a phase has just begun
            if limit_s is not None and idle_s > limit_s:
                self.ledger.write()
                self._peers.end_hung(f"no progress in {_in_words(phase)} for {idle_s:.0f} s")
                return
            self.ledger.beat()


def deadline_s(config: WatchdogConfig, phases: Phases, phase: str) -> float | None:
    """Returns the seconds without progress after which a phase counts as hung; None without a limit."""
    if phase in ("step", "device"):
        if phases.done == (phases.start_step or 0):  # the first step may still compile
            return config.compile_s
        return config.step_s and max(config.step_s, config.step_factor * (phases.median_step_s() or 0.0))
    named = {"compile": config.compile_s, "restore": config.restore_s, "data": config.data_s, "save": config.save_s}
    named |= {"evaluation": config.evaluation_s, "sample": config.evaluation_s}
    return named.get(phase, config.other_s)


def is_busy(array: Any) -> bool:
    """Whether the devices still compute a `jax.Array`; `is_ready` is missing in its public type."""
    return not array.is_ready()


def _in_words(phase: str) -> str:
    """Returns how messages name a phase."""
    return {"device": "step", "data": "waiting for data"}.get(phase, phase)
