"""PostgreSQL: how far the build of an index is, asked on a connection of its own, since the builder's waits."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...accounting import clock
from ...db.pg_connection import connect_postgresql
from ...ipc.repeating import repeating
from .index_catalog import Name, qualified

if TYPE_CHECKING:
    import psycopg

    from ...db.address import DatabaseAddress

    Connection = psycopg.Connection[tuple[Any, ...]]

ASK_SECONDS = 2.0
"""Between two questions; the first comes after as long, so that a small index costs no connection."""

RATE_SECONDS = 60.0
"""Over which the rate is taken: a graph grows more slowly the larger it is, so the mean of the build is too good."""

_PROGRESS = """
SELECT phase, blocks_done, blocks_total, tuples_done, tuples_total FROM pg_stat_progress_create_index
WHERE datname = current_database() AND relid IN (
  SELECT to_regclass(%(table)s) UNION SELECT relid FROM pg_partition_tree(to_regclass(%(table)s)))
ORDER BY blocks_total DESC NULLS LAST LIMIT 1
"""


class BuildEstimate:
    """Share done and seconds left of one build, from what was seen of it."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int, int]] = deque()

    def take(self, done: int, total: int, now: float) -> None:
        """Note how much is done at a moment (monotonic seconds). Another total is another stage of the build."""
        if self._points and (self._points[-1][2] != total or self._points[-1][1] > done):
            self._points.clear()
        self._points.append((now, done, total))
        while len(self._points) > 2 and now - self._points[0][0] > RATE_SECONDS:
            self._points.popleft()

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self._points[-1][1] / self._points[-1][2]

    @property
    def seconds_left(self) -> float | None:
        """At the rate of the last minute; None where nothing was done in it."""
        (t0, d0, _), (t1, d1, total) = self._points[0], self._points[-1]
        return (total - d1) * (t1 - t0) / (d1 - d0) if d1 > d0 else None


@contextlib.contextmanager
def watched(address: DatabaseAddress, table: Name, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Tell how far the build is that goes on in this block, every ASK_SECONDS, in a thread.

    Args:
        table: The table whose index is built, or a partitioned one above it.
        what: What is told before it: ``building articles_embedding_idx``.
        tell: Called with a line for a person; must be safe to call from a thread.
    """
    estimate = BuildEstimate()
    connection: psycopg.Connection[tuple[Any, ...]] | None = None

    def ask() -> None:
        nonlocal connection
        # Whatever is wrong with the database, the build itself will say.
        with contextlib.suppress(Exception):
            connection = connection or connect_postgresql(address, role="index progress")
            if (line := _ask(connection, table, estimate)) and not ended.is_set():
                tell(f"{what}: {line}")

    def close() -> None:
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    with repeating(ask, ASK_SECONDS, "index progress", last=close, patience=ASK_SECONDS) as ended:
        yield


def _ask(connection: Connection, table: Name, estimate: BuildEstimate) -> str:
    """The line for a person; '' where nothing is built, or the server does not say how far it is."""
    with connection.transaction():
        row = connection.execute(_PROGRESS, {"table": qualified(table)}).fetchone()
    if row is None:
        return ""
    phase, blocks_done, blocks_total, tuples_done, tuples_total = row
    # pgvector counts the table's blocks that it has read; ivfflat, in its last stage, vectors.
    done, total = (blocks_done, blocks_total) if not tuples_total else (tuples_done, tuples_total)
    if not total:
        return str(phase)
    estimate.take(done, total, time.monotonic())
    left = estimate.seconds_left
    return f"{estimate.share:.0%}" + (f", about {clock(left)} left" if left else "")
