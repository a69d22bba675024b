"""A call in a thread, beside what else is done meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def beside(work: Callable[[], T], name: str) -> Callable[[], T]:
    """Begin a call in a thread of its own, which does not keep the process from ending.

    Args:
        name: Of the thread.

    Returns:
        Waits for the result, or raises what the call has raised.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future.result
