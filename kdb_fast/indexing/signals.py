"""Signals that stop a run: the first one lets it write what is embedded, the next ends it at once."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from ..errors import StoppedError
from ..receipt import Receipt

SAME_SIGNAL_SECONDS = 0.5
"""A signal that comes again so soon is the same one, delivered to the process and to its group."""

GRACE_SECONDS = 8.0
"""A run that has not ended so long after a signal is stopped at once: a container is killed after ten seconds.
What has been embedded is written in less, unless the database makes us wait; see ``pipeline.DRAIN_SECONDS``."""

INSIST_SECONDS = 1.0
"""From then on every wait that is left, in the clearing up too, ends after so long."""


class StopFlag:
    """How often a stop was asked for, and by which signal; the receipt of a run that was ended at once."""

    def __init__(self) -> None:
        self.count = 0
        self.signum = 0
        self.receipt: Receipt | None = None


@contextlib.contextmanager
def stopping_by_signal() -> Iterator[StopFlag]:
    """Turn SIGINT, SIGTERM and SIGHUP into a flag; the second one, or GRACE_SECONDS, ends the block at once.

    Outside the main thread (a library caller) signals are left alone.

    Raises:
        StoppedError: The block was ended at once.
    """
    flag = StopFlag()

    last = 0.0

    def handler(signum: int, frame: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if flag.count and now - last < SAME_SIGNAL_SECONDS:
            return
        last = now
        flag.count += 1
        if flag.count == 1:
            flag.signum = signum
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS, INSIST_SECONDS)
        else:
            signal.setitimer(signal.ITIMER_REAL, INSIST_SECONDS, INSIST_SECONDS)
            raise KeyboardInterrupt

    def insist(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous: dict[int, Any] = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name)
            # Under nohup it is ignored, and must be.
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
        previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, insist)
    except ValueError:
        previous = {}
    try:
        yield flag
    except KeyboardInterrupt:
        stopped = StoppedError(
            "Stopped at once; the transaction in progress was rolled back.", signum=flag.signum or signal.SIGINT
        )
        stopped.receipt = flag.receipt
        raise stopped from None
    finally:
        if previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in previous.items():
            signal.signal(number, old)
