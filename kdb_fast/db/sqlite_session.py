"""SQLite: transactions, and waiting for the locks of other connections."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Callable, Iterator
from typing import TypeVar

from .retrying import Backoff, retry
from .sqlite_errors import kind_of

T = TypeVar("T")

BUSY_STEP_MS = 200
"""Milliseconds of one wait for another program's transaction."""

BUSY_PAUSE_SECONDS = 0.01
"""Between two waits: SQLite itself has waited, unless it sees that this would be in vain."""


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, milliseconds: int | None = None) -> Iterator[None]:
    """A write transaction: committed at the end, rolled back as a whole on any exception.

    Within a transaction of the caller it is a part of that one: rolled back alone, committed by the caller.

    Args:
        milliseconds: How long other connections are waited for: for writers at its begin and, where the file has no
            write-ahead log, for readers at its end. None for as long as the connection's busy time-out says.
    """
    begin, commit, rollback = ("BEGIN IMMEDIATE", "COMMIT", ["ROLLBACK"])
    if connection.in_transaction:
        begin, commit = "SAVEPOINT kdb_fast_unit", "RELEASE kdb_fast_unit"
        rollback = ["ROLLBACK TO kdb_fast_unit", "RELEASE kdb_fast_unit"]
    if connection.in_transaction:
        connection.execute(begin)
    else:
        patiently(connection, lambda: connection.execute(begin), milliseconds)
    try:
        yield
        patiently(connection, lambda: connection.execute(commit), milliseconds)
    except BaseException:
        # After a full disk, a failed read or write, or RAISE(ROLLBACK), SQLite has rolled back by itself.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                for statement in rollback:
                    connection.execute(statement)
        raise


def patiently(connection: sqlite3.Connection, work: Callable[[], T], milliseconds: int | None = None) -> T:
    """``work()``, again while another connection's lock is in its way.

    In short steps, between which Python handles signals: within SQLite a Ctrl-C would wait as long as we do.

    Args:
        work: One statement, or what is harmless a second time.
        milliseconds: How long; None for the connection's busy time-out.

    Raises:
        sqlite3.OperationalError: The lock was still there.
    """
    (own,) = connection.execute("PRAGMA busy_timeout").fetchone()
    patience = int(own) if milliseconds is None else milliseconds
    step = min(patience, BUSY_STEP_MS)
    connection.execute(f"PRAGMA busy_timeout = {step}")
    backoff = Backoff((patience - step) / 1000, itertools.repeat(BUSY_PAUSE_SECONDS))
    try:
        return retry(work, backoff, kind_of, explain=lambda error: error)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(own)}")
