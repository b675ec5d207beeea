"""Counts the programs that this process has compiled, or taken from the compile cache."""

import functools

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_counts = {_EVENT: 0}


def count() -> int:
    """Returns the number of programs since the first call."""
    _listen()
    return _counts[_EVENT]


@functools.cache
def _listen() -> None:
    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _counts:
            _counts[event] += 1

    jax.monitoring.register_event_duration_secs_listener(listener)
