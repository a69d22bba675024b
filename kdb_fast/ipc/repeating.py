"""A call that is repeated in a thread while a block runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeating(
    work: Callable[[], object],
    seconds: float,
    name: str,
    *,
    last: Callable[[], object] = lambda: None,
    patience: float | None = None,
) -> Iterator[threading.Event]:
    """Call ``work`` every so many seconds, in a thread, until the block ends; the first time after as many.

    Args:
        work: Must not raise; it may be under way when the block ends.
        name: Of the thread.
        last: Called in the thread when it ends, such as to close what ``work`` has opened.
        patience: How long the end of the block waits for a call that is under way; None for as long as it takes.

    Yields:
        What is set as soon as the block has ended.
    """
    ended = threading.Event()

    def repeat() -> None:
        try:
            while not ended.wait(seconds):
                work()
        finally:
            last()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        ended.set()
        thread.join(patience)
