"""Calls functions in threads of their own, whose results are waited for later."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait


def in_thread[T](call: Callable[[], T], name: str, *, daemon: bool) -> Future[T]:
    """Returns the result that a function will have; Python does not wait for a daemon thread at its end."""
    result = Future[T]()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=daemon).start()
    return result


def ask_in_thread[T](ask: Callable[[], T], timeout_s: float) -> Future[T]:
    """Asks in a thread, since clients may wait without an end; the answer is done unless that takes longer."""
    answer = in_thread(ask, "answer", daemon=True)
    wait([answer], timeout_s)
    return answer
