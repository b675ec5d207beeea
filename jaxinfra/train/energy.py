"""Sums up the energy of the devices of all processes, for the ledger in process 0."""

from typing import Self

import jax

from jaxinfra.processes.peer_connection import Json
from jaxinfra.processes.peers import Peers
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.energy import GpuMeter


class Energy:
    """A context manager that measures the devices of this process, if the config asks for it."""

    def __init__(self, config: TrackConfig, peers: Peers) -> None:
        """Raises ConfigError if a package is missing."""
        self._meter = None if config.energy is None else GpuMeter(_local_gpus())
        self._peers = peers
        self._others: list[float | None] = [None] * (peers.count - 1)

    def __enter__(self) -> Self:
        if self._meter is not None:
            self._meter.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._meter is not None:
            self._meter.close()

    @property
    def joules(self) -> float | None:
        """In process 0, of all processes as far as they have told it; None if nothing is measured."""
        found = [each for each in (self._meter and self._meter.joules, *self._others) if each is not None]
        return sum(found) if found else None

    def tell(self) -> None:
        """Tells process 0 what this process has measured; all processes must call it, none waits."""
        if self._meter is not None:
            self._peers.collect(self._meter.joules, "energy", self._take)

    def _take(self, values: list[Json]) -> None:
        """Keeps the last number of a process that has ended."""
        self._others = [new if new is not None else old for old, new in zip(self._others, values[1:], strict=True)]


def _local_gpus() -> list[int]:
    """Returns the numbers in CUDA of the GPUs of this process."""
    return [device.local_hardware_id for device in jax.local_devices() if device.platform == "gpu"]
