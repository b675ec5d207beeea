"""Finds the devices of the run, and the memory of those of this process.

An unusable platform is an error of one line.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax

from jaxinfra.errors import ConfigError
from jaxinfra.machine import platforms
from jaxinfra.parallel.mesh import Device
from jaxinfra.processes.peers import current_peers

_PLATFORM_LOGGER = "jax._src.xla_bridge"  # JAX logs here about platforms and plugins


def all_devices() -> Sequence[Device]:
    """Returns the devices of all processes of the run.

    Raises ConfigError if the platform of JAX_PLATFORMS is unusable, or if JAX was connected without `join.join`.
    """
    if jax.config.jax_platforms is None:  # a script or notebook, in which JAX has not started yet
        jax.config.update("jax_platforms", platforms.available_platforms())
    with _capture_logs(_PLATFORM_LOGGER) as records:
        try:
            devices = jax.devices()
        except (RuntimeError, AssertionError) as error:  # AssertionError: JAX has no plugin for the platform
            logged = [str(record.exc_info[1]) for record in records if record.exc_info and record.exc_info[1]]
            records.clear()  # the ConfigError tells it all
            cause = str(error).split(" (set JAX_PLATFORMS", 1)[0] or "; ".join(logged) or "JAX has no plugin for it"
            raise ConfigError(
                f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: unusable platform: {' '.join(cause.split())}; "
                "use --devices cpu, or install JAX for that platform"
            ) from error
    if (count := jax.process_count()) != current_peers().count:
        raise ConfigError(f"{count} JAX processes: call jaxinfra.join() in place of jax.distributed.initialize()")
    return devices


_MEMORY_METRICS = {"device_in_use_bytes": "bytes_in_use", "device_peak_bytes": "peak_bytes_in_use"}


def device_memory(names: Mapping[str, str] = _MEMORY_METRICS) -> dict[str, float]:
    """Returns figures of the fullest local device, by default use and peak; {} if the platform does not report them.

    `names` maps the names in the result to those of JAX.
    """
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not stats:
        return {}
    return {name: float(max(s[key] for s in stats)) for name, key in names.items() if key in stats[0]}


@contextmanager
def _capture_logs(name: str) -> Iterator[list[logging.LogRecord]]:
    """Collects the records of a logger; on exit, logs those still in the list on one line each."""
    logger, records = logging.getLogger(name), []

    def capture(record: logging.LogRecord) -> bool:
        records.append(record)
        return False  # it is not logged now

    logger.addFilter(capture)
    try:
        yield records
    finally:
        logger.removeFilter(capture)
        for record in records:
            if record.exc_info and record.exc_info[1]:  # an unusable platform needs no traceback
                cause = " ".join(str(record.exc_info[1]).split())
                record.msg, record.args = f"{record.getMessage()}: {cause}", ()
                record.exc_info = record.exc_text = None
            logger.handle(record)
