"""Loops whose steps communicate between devices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

_silent = ContextVar("silent", default=False)


@contextmanager
def silent_loops() -> Iterator[None]:
    """A context in which no loop communicates, so that `scan` need not unroll any."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def scan[C, Y](
    body: Callable[[C, Any], tuple[C, Y]], init: C, xs: Any = None, length: int | None = None
) -> tuple[C, Y]:
    """Computes `jax.lax.scan`; unrolled where Gloo connects CPU devices, as it does those of several processes.

    XLA starts what follows a loop on CPU devices before the loop has ended, collectives too. Gloo pairs the collectives
    of different processes by their order alone: those of the loop would meet those that follow it, and Gloo would end
    the process. Without a loop XLA keeps the order of all collectives.
    """
    unroll = jax.distributed.is_initialized() and jax.default_backend() == "cpu" and not _silent.get()
    return jax.lax.scan(body, init, xs, length, unroll=unroll or 1)
