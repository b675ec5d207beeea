"""Calls functions in threads of their own, whose results are waited for later."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_thread[T](call: Callable[[], T], name: str, *, daemon: bool) -> Future[T]:
    """Returns the result that a function will have; Python does not wait for a daemon thread at its end."""
    result = Future[T]()

    def run() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=daemon).start()
    return result
