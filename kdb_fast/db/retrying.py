"""What becomes of a failed operation on a database, and the one loop that tries again.

What an error means is said once for each database: :mod:`.pg_errors`, :mod:`.sqlite_errors`. Stores, sources, inserters
and the library all decide by that, and repeat by :func:`retry`.
"""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..settings import patience_seconds

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 3.0

MOST_TIMEOUTS = 3
"""Attempts after the first one that may end in a time-out: each may have taken the whole of it, for a lock 30 s."""


class ErrorKind(enum.Enum):
    """What an error of a database means for the operation that met it."""

    PASSING = "passing"
    """The same operation may succeed later: it is tried again until the patience is over."""
    TIMEOUT = "time-out"
    """A limit of time ended it: it is tried again, :data:`MOST_TIMEOUTS` times."""
    DATA = "data"
    """A row is at fault. Where rows are written it is found and rejected; elsewhere the error is final."""
    RESOURCE = "resource"
    """Disk or memory ran out; final: waiting frees none."""
    REFUSED = "refused"
    """A table, column or right is not what it must be; final: a person must look."""
    FAILED = "failed"
    """The database itself failed; final."""


class Backoff:
    """How long failures are borne, from the first one on, and how often it is tried meanwhile.

    Args:
        seconds: None for ``KDB_FAST_PATIENCE``.
        pauses: Longest wait, in seconds, before each further attempt; no attempt follows the last of them. None for
            pauses that grow from FIRST_PAUSE_SECONDS to LONGEST_PAUSE_SECONDS.
    """

    def __init__(self, seconds: float | None = None, pauses: Iterable[float] | None = None) -> None:
        self.seconds = patience_seconds() if seconds is None else seconds
        self._pauses = iter(_growing() if pauses is None else pauses)
        self._next = next(self._pauses, None)
        self._deadline: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the failure that has just happened was the last one to bear."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self.seconds
        return self._next is None or now + self._next > self._deadline

    def pause(self) -> None:
        """Wait before the next attempt, not as long as others who wait for the same."""
        time.sleep((self._next or 0.0) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        self._next = next(self._pauses, None)


def _growing() -> Iterator[float]:
    seconds = FIRST_PAUSE_SECONDS
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_PAUSE_SECONDS)


def retry(
    work: Callable[[], T],
    backoff: Backoff,
    kind: Callable[[Exception], ErrorKind | None],
    explain: Callable[[Exception], Exception],
    again: Callable[[Exception], None] = lambda error: None,
) -> T:
    """``work()``, again after failures that pass.

    Args:
        work: One attempt; a second one after a failed one must be harmless.
        backoff: A new one.
        kind: What an exception means; None where that is not for us to say, and it is raised as it is.
        explain: The exception to raise for the last failure, which may be that one itself.
        again: Called before each pause.
    """
    timeouts = 0
    while True:
        try:
            return work()
        except Exception as error:
            found = kind(error)
            if found is None:
                raise
            timeouts += found is ErrorKind.TIMEOUT
            passes = found is ErrorKind.PASSING or (found is ErrorKind.TIMEOUT and timeouts <= MOST_TIMEOUTS)
            if backoff.is_over or not passes:
                explained = explain(error)
                if explained is error:
                    raise
                raise explained from error
            again(error)
        backoff.pause()
