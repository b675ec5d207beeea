"""GPUs that are not there: a module with the functions, types and errors of the real pynvml, and numbers of a test.

It has no name that the real module lacks, takes no arguments that the real function does not, and refuses what NVML
refuses: calls before `nvmlInit`, a GPU that does not exist, and what a GPU does not support. What it does not model is
an error.
"""

import inspect
import sys
import time
from types import ModuleType
from typing import Any

import pynvml as real

from jaxinfra.train import energy


class FakeNvml(ModuleType):
    """GPUs that use `watts`, and count that from `added_joules` on if `counts`; each read raises `error`, if any.

    A GPU before Volta has no counter.
    """

    def __init__(self, watts: list[float], *, counts: bool = True) -> None:
        super().__init__("pynvml")
        self.watts, self.counts, self.error, self.added_joules = watts, counts, None, 1e6
        self.is_open, self._handles = False, [real.c_nvmlDevice_t() for _ in watts]

    def __getattr__(self, name: str) -> Any:
        what = getattr(real, name)  # AttributeError for a name that the real module lacks
        if not inspect.isfunction(what):
            return what

        def call(*arguments: Any) -> Any:
            inspect.signature(what).bind(*arguments)
            if not self.is_open and name != "nvmlInit":
                raise real.NVMLError(real.NVML_ERROR_UNINITIALIZED)
            model = type(self).__dict__.get(f"_{name}")
            if model is None:
                raise real.NVMLError(real.NVML_ERROR_FUNCTION_NOT_FOUND)
            return model(self, *arguments)

        return call

    def _nvmlInit(self) -> None:
        self.is_open = True

    def _nvmlShutdown(self) -> None:
        self.is_open = False

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if not 0 <= real.c_uint(index).value < len(self._handles):
            raise real.NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        return self._handles[index]

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        real.c_char_p(uuid.encode())
        if uuid not in (names := [f"GPU-{number}" for number in range(len(self._handles))]):
            raise real.NVMLError(real.NVML_ERROR_NOT_FOUND)
        return self._handles[names.index(uuid)]

    def _read(self, handle: Any) -> float:
        assert isinstance(handle, real.c_nvmlDevice_t)
        if self.error is not None:
            raise real.NVMLError(self.error)
        return self.watts[next(number for number, each in enumerate(self._handles) if each is handle)]

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        watts = self._read(handle)
        if not self.counts:
            raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
        return round(1e3 * (self.added_joules + watts * time.monotonic()))

    def _nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return round(1e3 * self._read(handle))


def install(*watts: float) -> None:
    """Gives this process GPUs; a config file calls it, so that each process of a run has them."""
    sys.modules["pynvml"] = FakeNvml([*watts])
    energy._local_gpus = lambda: [*range(len(watts))]
