"""The devices of this process, asked for once; what JAX logs on the way becomes part of the answer."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from jaxinfra.errors import ConfigError

_STARTING = "jax._src.xla_bridge"  # the logger of JAX that tells of platforms and plugins


def local_devices() -> Sequence[Any]:
    """The devices of this process; ConfigError where it lacks the platform asked for, or JAX has other processes."""
    with _capture_logs(_STARTING) as said:
        try:
            found = jax.devices()
        except (RuntimeError, AssertionError) as error:  # the latter where JAX has no plugin for the platform at all
            reasons = [str(record.exc_info[1]) for record in said if record.exc_info and record.exc_info[1]]
            said.clear()
            cause = str(error).split(" (set JAX_PLATFORMS", 1)[0] or "; ".join(reasons) or "JAX has no plugin for it"
            raise ConfigError(
                f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: cannot be used: {' '.join(cause.split())}; "
                "use --devices cpu, or install JAX for that platform"
            ) from error
    if jax.process_count() > 1:
        raise ConfigError(f"{jax.process_count()} processes: a run has one process so far; start it on one host")
    return found


@contextmanager
def _capture_logs(name: str) -> Iterator[list[logging.LogRecord]]:
    """The records of a logger, kept until the end; those that are still in the list then are logged, a line each."""
    logger, records = logging.getLogger(name), []

    def hold(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield records
    finally:
        logger.removeFilter(hold)
        for record in records:
            if record.exc_info and record.exc_info[1]:  # a platform that cannot be used is worth no traceback
                record.msg, record.args = f"{record.getMessage()}: {' '.join(str(record.exc_info[1]).split())}", ()
                record.exc_info = record.exc_text = None
            logger.handle(record)
