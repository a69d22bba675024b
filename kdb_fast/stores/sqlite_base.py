"""SQLite: what its modules share. Transactions, what an error means, pieces of statements."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from ..errors import DatabaseError, KdbFastError, ResourceError, SchemaError

T = TypeVar("T")

KEYS_PER_QUERY = 500
"""Keys of one ``IN (…)``: SQLite before 3.32 takes at most 999 parameters."""

BUSY_STEP_MS = 200
"""Milliseconds of one wait for another program's transaction."""

NOT_THIS_ROW = {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
"""Primary result codes that speak about the data of a statement, not about the database."""

REASONS = {
    "SQLITE_CONSTRAINT_NOTNULL": "not_null",
    "SQLITE_CONSTRAINT_CHECK": "check",
    "SQLITE_CONSTRAINT_UNIQUE": "unique",
    "SQLITE_CONSTRAINT_PRIMARYKEY": "unique",
    "SQLITE_CONSTRAINT_ROWID": "unique",
}


class RowIgnoredError(sqlite3.IntegrityError):
    """A statement changed fewer rows than it was given: a trigger dropped one without an error."""


def primary_code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code, or None for an error of Python's module itself."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def refusal(error: sqlite3.Error) -> tuple[str, str] | None:
    """(reason, detail) if the error is about the data of a row, None if it is about the database."""
    if isinstance(error, RowIgnoredError):
        return "database_refused", str(error)
    if primary_code(error) not in NOT_THIS_ROW:
        return None
    return REASONS.get(error.sqlite_errorname, "database_refused"), str(error)


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Errors of sqlite3 become errors of kdb-fast.

    Args:
        doing: What is being done, for the message: "writing", "taking the lock".
    """
    try:
        yield
    except sqlite3.Error as error:
        raise explain(error, doing) from error
    except MemoryError as error:
        raise ResourceError(
            f"SQLite ran out of memory while {doing}.", remedy="Give the process more memory."
        ) from error


def explain(error: sqlite3.Error, doing: str) -> KdbFastError:
    """The error of kdb-fast that says what an error of sqlite3 means."""
    text = f"while {doing}: {error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})."
    code = primary_code(error)
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return ResourceError(
            f"The disk is full or failing {text}",
            remedy="Free disk space, then run the same command again; what was committed is kept.",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DatabaseError(
            f"Another program kept the database locked {text}",
            remedy="End its transaction, then run the same command again; what was committed is kept.",
        )
    if code == sqlite3.SQLITE_READONLY:
        return SchemaError(
            f"The database cannot be written {text}",
            remedy="Make its directory writable, and the file: SQLite keeps its journal beside it.",
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DatabaseError(
            f"The database file is damaged {text}",
            remedy="Check it with PRAGMA integrity_check, and restore a copy from before the damage.",
        )
    return DatabaseError(f"SQLite failed {text}", remedy="What was committed is kept; run the same command again.")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A write transaction: committed at the end, rolled back as a whole on any exception.

    Within a transaction of the caller it is a part of that one: rolled back alone, committed by the caller.
    """
    begin, commit, rollback = ("BEGIN IMMEDIATE", "COMMIT", ["ROLLBACK"])
    if connection.in_transaction:
        begin, commit = "SAVEPOINT kdb_fast_unit", "RELEASE kdb_fast_unit"
        rollback = ["ROLLBACK TO kdb_fast_unit", "RELEASE kdb_fast_unit"]
    if connection.in_transaction:
        connection.execute(begin)
    else:
        _patiently(connection, begin)
    try:
        yield
        _patiently(connection, commit)
    except BaseException:
        # After a full disk, a failed read or write, or RAISE(ROLLBACK), SQLite has rolled back by itself.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                for statement in rollback:
                    connection.execute(statement)
        raise


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Begin or commit a write transaction, waiting for other programs' to end as long as the connection's time-out
    says: for writers at its begin and, where the file has no write-ahead log, for readers at its end.

    In short steps, between which Python handles signals: within SQLite a Ctrl-C would wait as long as we do.
    """
    (patience,) = connection.execute("PRAGMA busy_timeout").fetchone()
    deadline = time.monotonic() + patience / 1000
    connection.execute(f"PRAGMA busy_timeout = {min(int(patience), BUSY_STEP_MS)}")
    try:
        while True:
            try:
                connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                    raise
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(patience)}")


def batches(values: Sequence[T], size: int = KEYS_PER_QUERY) -> Iterator[Sequence[T]]:
    """The values in order, at most ``size`` at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def select_in(
    connection: sqlite3.Connection, query: str, values: Sequence[object], *first: object
) -> Iterator[tuple[Any, ...]]:
    """Rows of a query for many values.

    Args:
        query: A SELECT that ends in ``IN (…)``; the values are put there, a bounded number at a time.
        first: Parameters that come before the values.
    """
    for batch in batches(values):
        yield from connection.execute(query.replace("…", ",".join("?" * len(batch))), (*first, *batch))


def now() -> str:
    """Now in UTC, as text (see :func:`timestamp`). SQLite has no other clock than the machine's."""
    return timestamp(datetime.now(UTC))


def timestamp(moment: datetime) -> str:
    """A moment as KameleonDB's SQLAlchemy writes it, in UTC: ``2026-01-31 23:59:59.000000``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def moment(text: str) -> datetime:
    """The aware datetime of a timestamp of SQLite: UTC, written without a zone."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def quoted(identifier: str) -> str:
    """An SQL identifier, quoted. Raises SchemaError for one with a NUL, which SQL text cannot hold."""
    if "\x00" in identifier:
        raise SchemaError("The name of a table holds a NUL character; it cannot be read.")
    return '"' + identifier.replace('"', '""') + '"'


def table_exists(connection: sqlite3.Connection, name: str) -> bool:
    """Whether the main database has a table (ordinary or virtual) of this name."""
    row = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)).fetchone()
    return row is not None
