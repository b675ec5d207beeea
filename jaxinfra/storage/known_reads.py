"""Remembers the answers of a bucket, so that one process asks for all processes of a run.

Only for what never changes while it is known: see `processes.shared_reads`. Local files are always read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

from jaxinfra.storage.location import is_remote

type Answer = bytes | bool
type KnownReads = dict[str, Answer]
"""Answers by question and URL, such as "read s3://bucket/store/versions.json"."""

_known = ContextVar[KnownReads | None]("known_reads", default=None)


@contextmanager
def known_reads(known: KnownReads) -> Iterator[None]:
    """Inside, this thread takes answers from `known`, and adds those that it had to ask for."""
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def ask_once[A: Answer](question: str, url: str, ask: Callable[[], A]) -> A:
    """Returns the known answer, or that of `ask`, whose errors it passes on."""
    known = _known.get()
    if known is None or not is_remote(url):
        return ask()
    key = f"{question} {url}"
    if key not in known:
        known[key] = ask()
    return cast(A, known[key])
