"""Measures the energy of NVIDIA GPUs by NVML, in a thread. Imports no JAX."""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfra.packages import import_optional

_EVERY_S = 1.0

_log = logging.getLogger(__name__)


class GpuMeter:
    """Sums up what some GPUs of this host have used since `start`; a failure is a warning, and training goes on.

    NVML counts the energy of a GPU since its driver was loaded. Of one that has no such counter, the power is sampled
    once a second.
    """

    def __init__(self, devices: Sequence[int], environment: Mapping[str, str] = os.environ) -> None:
        """Takes GPUs by their numbers in CUDA; raises ConfigError if the package is missing."""
        self._nvml: Any = import_optional("pynvml", needed_by="track.energy", install="jaxinfra[energy]")
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        self._names = [visible[device].strip() if device < len(visible) else str(device) for device in devices]
        self._gpus: list[Any] = []
        self._last: list[tuple[str, float]] = []  # of each GPU: what the number counts, and the number
        self._sampled_s = 0.0
        self._ended, self._thread, self._has_warned = threading.Event(), threading.Thread(), False
        self.joules: float | None = None
        """None if nothing can be measured."""

    def start(self) -> None:
        """Starts the thread, if there is a GPU that can be measured."""
        if not self._names:
            return _log.warning("track.energy: this process uses no NVIDIA GPU; no energy is measured")
        try:
            self._nvml.nvmlInit()
            index, uuid = self._nvml.nvmlDeviceGetHandleByIndex, self._nvml.nvmlDeviceGetHandleByUUID
            self._gpus = [index(int(name)) if name.isdecimal() else uuid(name) for name in self._names]
            self._last, self._sampled_s = [self._read(gpu) for gpu in self._gpus], time.monotonic()
        except self._nvml.NVMLError as error:
            return _log.warning("track.energy: no energy is measured: NVML says %s; training goes on", error)
        self.joules = 0.0
        self._thread = threading.Thread(target=self._sample_regularly, name="energy", daemon=True)
        self._thread.start()

    def _read(self, gpu: Any) -> tuple[str, float]:
        """Returns the joules of a GPU since its driver was loaded; its watts, if it does not count them."""
        try:
            return "joules", self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
        except self._nvml.NVMLError_NotSupported:
            return "watts", self._nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3

    def sample(self) -> None:
        """Adds what was used since the last sample."""
        try:
            found = [self._read(gpu) for gpu in self._gpus]
        except self._nvml.NVMLError as error:
            if not self._has_warned:
                _log.warning("track.energy: NVML says %s; what is used until it answers may be missing", error)
            self._has_warned = True
            return
        now_s = time.monotonic()
        for (was, before), (what, value) in zip(self._last, found, strict=True):
            if what == "watts":
                self.joules = (self.joules or 0.0) + value * (now_s - self._sampled_s)
            elif was == what and value > before:  # else the driver was loaded again
                self.joules = (self.joules or 0.0) + value - before
        self._last, self._sampled_s = found, now_s

    def _sample_regularly(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.sample()

    def close(self) -> None:
        """Takes the last sample, and ends the thread."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
            self.sample()
            self._nvml.nvmlShutdown()
